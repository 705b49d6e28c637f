"""What a user reads during `clt train`: its plan, warnings, progress, and what came of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planted import write_planted
from test_train_loop import configure, lines

import clt.progress as progress
from clt.cli import main
from clt.train.announcement import sink_warning
from clt.train.loop import train
from clt.train.report import render_training
from clt.train.selection import Selection
from clt.train.source import Source


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 800, val=100)


def rows(text: str) -> dict[str, str]:
    """By its first word, or two."""
    return {line[:8].strip(): line[9:] for line in text.splitlines()}


def test_a_run_says_what_it_will_do(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(cache, tmp_path / "run", steps=6, kinds=("text",), exclude=("sink",), lr=None)
    train(config)
    said = rows(capsys.readouterr().err)
    assert said["cache"] == f"{cache}: 400 of 800 tokens of split train count (text; no sinks)"
    assert said["clt"].startswith("3 layers of 40 latents, topk, k 4; 6 decoders, ")
    assert said["steps"] == "4 of 100 tokens; 400 tokens, 1.00 epochs"
    rate = lines(config.run)[0]["lr"]
    assert said["lr"].startswith(f"{rate:.2e} by the rule 0.0002 / sqrt(latents / 16384), Gao")
    assert said["lr"].endswith("; adam, 0 steps of warm-up, then linear to 0")
    assert said["run"] == str(config.run)
    train(config, resume=True)
    assert rows(capsys.readouterr().err)["run"] == f"{config.run}, goes on after step 4"


def test_the_perfect_shuffle_is_what_a_permutation_has(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """16 samples of 50 tokens in one buffer: what is expected is what is perfect, and 99 * 49 / 799."""
    train(configure(cache, tmp_path / "run", steps=1, buffer_tokens=8192))
    everything = rows(capsys.readouterr().err)
    assert everything["cache"].endswith("tokens of split train count (text, image, bos, template)")
    said = everything["shuffle"]
    assert said.startswith("a token will meet 6.0")
    assert said.endswith(" others of its sample in a batch; 6.07 if order were perfect")


def test_the_warning_names_the_layers_that_sinks_hold(make_cache: Callable[..., Any]) -> None:
    cache = make_cache()
    warning = sink_warning(Source([cache.path], "train"))
    assert warning is not None
    assert "of layer 0 (100%), 2 (100%), 5 (100%); FVU" in warning
    assert "--exclude bos,sink" in warning
    assert sink_warning(Source([cache.path], "train", selection=Selection(exclude=("sink",)))) is None


def test_a_run_says_what_came_of_it(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In words, and as one JSON object with the same numbers."""
    run = tmp_path / "run"
    options = [str(cache), "--run-name", "x", "--out", str(run), "--latents", "40", "--k", "4"]
    arguments = ["clt", "train", *options, "--steps", "2", "--batch-tokens", "100"]
    monkeypatch.setattr("sys.argv", arguments)
    assert exit_code() == 0
    said = rows(capsys.readouterr().out)
    assert said["run"] == f"{run}: 2 steps, 200 tokens"
    assert said["trained"].startswith(f"FVU of the last step {lines(run)[-1]['fvu']:.4f}; ")
    assert said["report"].startswith(f"{run}/report.html; ")
    monkeypatch.setattr("sys.argv", [*arguments, "--resume", "--json"])
    assert exit_code() == 0
    found = json.loads(capsys.readouterr().out)
    held = found["held_out"]
    assert found["fvu"] is None
    assert said["held out"] == (
        f"FVU {held['fvu']:.4f} on 100 tokens (text {held['fvu_kind']['text']:.4f}, image "
        f"{held['fvu_kind']['image']:.4f}), L0 {held['l0']:.1f}, dead {held['dead']:.1%}"
    )


def exit_code() -> Any:
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_long_wait_for_the_cache_comes_with_advice(cache: Path, tmp_path: Path) -> None:
    report = train(configure(cache, tmp_path / "run", steps=1))
    slow = rows(render_training(report._replace(stall=0.2)))["trained"]
    assert slow.endswith("20.0% of it waiting for the cache; more --threads or a faster disk would help")
    assert rows(render_training(report._replace(stall=0.04)))["trained"].endswith("for the cache")


def test_plain_lines_have_the_step_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where stderr is no terminal; the last line has the note and the time that it took."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress("train", total=400, unit="tok") as bar:
        for step in range(1, 5):
            now[0] = 3660.0 * step
            bar.add(100, f"step {step}/4, FVU 0.5")
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "train: 100/400 tok, 0.027 tok/s, 3 h 03 min left, step 1/4, FVU 0.5"
    assert last == "train: 400/400 tok, 0.027 tok/s, took 4 h 04 min, step 4/4, FVU 0.5"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (95, "1 min 35 s")]
)
def test_times(seconds: float, text: str) -> None:
    assert progress._time(seconds) == text
