"""Sweeps: runs that share one read are, bit for bit, the runs that each would have been alone."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planted import write_planted
from test_train_loop import lines, stop_after, weights

from clt.cli import main
from clt.stopping import StopRequested
from clt.train.config import TrainConfig
from clt.train.loop import train
from clt.train.run import Run
from clt.train.run_folder import load_config
from clt.train.sweep import sweep
from clt.train.sweep_file import Entry, read_sweep, sweep_configs
from clt.train.sweep_report import SweepReport, render_sweep

EIGHT = """
[[grid]]
k = [2, 4]
seed = [0, 1]

[[run]]
name = "jump"
activation = "jumprelu"
sparsity_coeff = 1e-3
auxk_alpha = 0.03125

[[run]]
name = "wide"
latents = 64
n-targets = 1
activation = "batchtopk"
optimizer = "muon"

[[run]]
name = "tied"
tie = "source"
skip_connection = true
lr_schedule = "cosine"
dtype = "bfloat16"
optimizer = "adam8"

[[run]]
name = "wild"
lr = 1e30
"""
SHARED: dict[str, Any] = {
    "k": 4,
    "latents": 40,
    "n_targets": 3,
    "lr": 5e-3,
    "batch_tokens": 100,
    "grad_acc_steps": 2,
    "buffer_tokens": 640,
    "threads": 2,
    "save_every": 2,
    "steps": 5,
    "seed": 7,
    "order_seed": None,
}
TIMING = ("tokens_per_s", "stall")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 2000, val=200)


def asked(cache: Path, folder: Path, text: str = EIGHT) -> tuple[Path, list[Entry], list[TrainConfig]]:
    """What `sweep` takes. jumprelu and relu have no k, so that each of these runs says its own."""
    path = folder.with_suffix(".toml")
    path.write_text(text)
    found = read_sweep(path)
    configs = []
    for entry in found:
        own = SHARED | ({"k": None} if "activation" in entry.settings else {})
        configs += sweep_configs({**own, "caches": (cache,)}, [entry], folder)
    return folder, found, configs


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepReport:
    return sweep(*asked(cache, tmp_path_factory.mktemp("whole") / "sweep"), resume=False)


def same(one: Path, other: Path) -> None:
    """Two run folders: weights, state and places bit for bit, and the lines but for their timings."""
    latest = (one / "latest").read_text()
    assert latest == (other / "latest").read_text()
    first, second = weights(one / latest), weights(other / latest)
    assert first.keys() == second.keys()
    assert all(bool((first[key] == second[key]).all()) for key in first)
    for name in ("trainer.json", "shape.json"):
        assert (one / latest / name).read_bytes() == (other / latest / name).read_bytes()
    left, right = (
        [{k: v for k, v in line.items() if k not in TIMING} for line in lines(run)] for run in (one, other)
    )
    assert left == right


def test_each_run_is_what_its_own_config_makes_alone(whole: SweepReport, tmp_path: Path) -> None:
    """Through config.json alone, which is all that a user has of it later."""
    names = [run.label for run in whole.runs]
    assert names == ["k=2,seed=0", "k=2,seed=1", "k=4,seed=0", "k=4,seed=1", "jump", "wide", "tied", "wild"]
    for label in ("k=2,seed=1", "jump", "wide", "tied"):
        config = replace(load_config(whole.folder / label), run=tmp_path / label)
        report = train(config)
        same(whole.folder / label, config.run)
        assert report.held_out == next(run.held_out for run in whole.runs if run.label == label)
    assert load_config(whole.folder / "k=2,seed=1").read_seed == 7


def test_a_run_that_diverges_is_dropped_and_the_others_go_on(whole: SweepReport) -> None:
    wild = whole.runs[-1]
    assert wild.diverged is not None
    assert wild.diverged.startswith("step 2: the loss, or its gradient, is not finite in layer 0")
    assert [run.step for run in whole.runs] == [5, 5, 5, 5, 5, 5, 5, 1]
    assert json.loads((whole.folder / "sweep.json").read_text())["diverged"] == {"wild": wild.diverged}
    text = render_sweep(whole)
    assert f"wild        diverged: {wild.diverged}" in text.splitlines()


def test_no_run_is_better_than_the_frontier_in_both(whole: SweepReport) -> None:
    known = [(run.l0, run.fvu) for run in whole.runs if run.diverged is None]
    best = [(run.l0, run.fvu) for run in whole.frontier]
    assert best == sorted(best)
    for l0, fvu in known:
        beaten = any(a <= l0 and b <= fvu and (a, b) != (l0, fvu) for a, b in known)  # type: ignore[operator]
        assert ((l0, fvu) in best) != beaten


def test_a_sweep_that_is_stopped_goes_on_exactly(cache: Path, whole: SweepReport, tmp_path: Path) -> None:
    cut = asked(cache, tmp_path / "cut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequested, "check", stop_after(3))
        with pytest.raises(StopRequested):
            sweep(*cut, resume=False)
    report = sweep(*cut, resume=True)
    for run in report.runs[:-1]:
        same(whole.folder / run.label, run.run)
    assert [run.fvu for run in report.runs] == [run.fvu for run in whole.runs]
    assert report.runs[-1].diverged == whole.runs[-1].diverged


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import clt.train.run as run
from test_train_sweep import asked
from clt.train.sweep import sweep
left, save = [int(sys.argv[4])], run.Run.save
def dying(self, *state):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    save(self, *state)
run.Run.save = dying
sweep(*asked(Path(sys.argv[2]), Path(sys.argv[3])), resume=False)
"""


def require_exact_resume(cache: Path, whole: SweepReport, folder: Path, saved: list[str]) -> None:
    """Runs that are ahead wait, those that are behind go on, and those without a checkpoint begin."""
    reached = sorted((path.read_text() for path in folder.glob("*/latest")), reverse=True)
    assert [name.removeprefix("step-").lstrip("0") for name in reached] == saved
    report = sweep(*asked(cache, folder), resume=True)
    for run in report.runs[:-1]:
        same(whole.folder / run.label, run.run)


def test_killed_between_the_saves_of_two_runs(cache: Path, whole: SweepReport, tmp_path: Path) -> None:
    """A real kill, after seven runs saved step 2, and three of them step 4."""
    command = [sys.executable, "-c", KILLED, Path(__file__).parent, cache, tmp_path / "cut", "10"]
    done = subprocess.run([str(part) for part in command], stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    require_exact_resume(cache, whole, tmp_path / "cut", ["4"] * 3 + ["2"] * 4)


def test_interrupted_between_the_first_saves(cache: Path, whole: SweepReport, tmp_path: Path) -> None:
    saves, save = iter(range(3)), Run.save

    def interrupted(self: Run, *state: Any) -> None:
        if next(saves, None) is None:
            raise KeyboardInterrupt
        save(self, *state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(*asked(cache, tmp_path / "cut"), resume=False)
    require_exact_resume(cache, whole, tmp_path / "cut", ["2"] * 3)


def test_a_complete_sweep_is_reported_again_and_no_other_one(
    cache: Path, whole: SweepReport, tmp_path: Path
) -> None:
    again = sweep(*asked(cache, whole.folder), resume=True)
    assert [run.fvu for run in again.runs] == [run.fvu for run in whole.runs]
    with pytest.raises(ValueError, match="sweep exists; choose another --run-name, or go on with --resume"):
        sweep(*asked(cache, whole.folder), resume=False)
    with pytest.raises(ValueError, match=r"sweep of other runs: k=2,seed=0, .*; now k=2; use the same file"):
        sweep(*asked(cache, whole.folder, "[[run]]\nname = 'k=2'\nk = 2"), resume=True)
    with pytest.raises(ValueError, match="holds no sweep to resume; leave out --resume"):
        sweep(*asked(cache, tmp_path / "none"), resume=True)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "sweep.json").write_text("[]")
    with pytest.raises(ValueError, match=r"sweep.json: expected a list of runs .*, found \[\]"):
        sweep(*asked(cache, tmp_path / "odd"), resume=True)
    changed = asked(cache, whole.folder, EIGHT.replace("n-targets = 1", "n-targets = 2"))
    with pytest.raises(ValueError, match="wide was trained otherwise"):
        sweep(*changed, resume=True)


def test_a_sweep_of_runs_that_all_diverge_is_an_error(cache: Path, tmp_path: Path) -> None:
    wanted = asked(cache, tmp_path / "all", "[grid]\nlr = [1e30, 2e30]\n")
    with pytest.raises(ValueError, match="all 2 runs of the sweep have diverged, the last one at step 2"):
        sweep(*wanted, resume=False)
    with pytest.raises(ValueError, match=r"all 2 runs of .*all have diverged; begin another with lower --lr"):
        sweep(*wanted, resume=True)


def test_eight_configurations_read_the_bytes_of_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where the shards are read: training and held-out tokens, whatever the number of runs."""
    read, preadv = [0], os.preadv

    def counted(descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        found = preadv(descriptor, buffers, offset, flags)
        read[0] += 0 if flags else found  # with flags it only looks what is at hand
        return found

    monkeypatch.setattr(os, "preadv", counted)
    by_runs = {}
    for number in (1, 8):
        read[0] = 0
        folder, entries, configs = asked(cache, tmp_path / str(number))
        configs = [replace(config, io="pread") for config in configs[:number]]
        report = sweep(folder, entries[:number], configs, resume=False)
        by_runs[number] = read[0]
        assert sum(run.step for run in report.runs) == {1: 5, 8: 7 * 5 + 1}[number]
    assert by_runs[1] == by_runs[8] > 100_000


def test_the_command_says_what_came_of_it_in_words_and_as_json(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the page has the same numbers; a dot lies where its numbers are."""
    file, folder = tmp_path / "s.toml", tmp_path / "sweep"
    file.write_text("[grid]\nk = [2, 4]\n")
    options = ["--out", str(folder), "--run-name", "x", "--latents", "40", "--batch-tokens", "100"]
    arguments = ["clt", "train", str(cache), "--sweep", str(file), *options, "--steps", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="0"):
        main()
    said = capsys.readouterr()
    rows = {line.split()[0]: line.split()[1:] for line in said.out.splitlines()}
    assert "2 runs, 0.0 M parameters in all, one read of the cache" in said.err
    monkeypatch.setattr("sys.argv", [*arguments, "--resume", "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    found = json.loads(capsys.readouterr().out)
    page = (folder / "report.html").read_text()
    for run in found["runs"]:
        assert run["settings"] == {"k": int(run["label"].removeprefix("k="))}
        assert rows[run["label"]][:3] == [f"{run['fvu']:.4f}", f"{run['l0']:.1f}", f"{run['dead']:.1%}"]
        assert f'data-name="{run["label"]}" data-x="{run["l0"]:.9g}" data-y="{run["fvu"]:.9g}"' in page
        assert f'href="{run["label"]}/report.html"' in page
        assert (folder / run["label"] / "report.html").exists()
    assert found["frontier"] == [label for label, cells in rows.items() if cells[-1] == "*"]
