"""`--log-to-wandb` with the real package, offline: its run file holds the lines of metrics.jsonl."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted import write_planted
from test_train_loop import configure, lines
from test_train_report import cut_short

from clt.train.loop import train
from clt.train.sweep import sweep
from clt.train.sweep_file import Entry
from clt.train.wandb_run import WandbRun

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7
FULL, LAST = 1, 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 800)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package wandb, told to stay off the network."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return wandb


def records(path: Path) -> Iterator[Any]:
    """Of a .wandb file: LevelDB's log format (checksum, length, type) around protocol buffers."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # as the end of a process does: waits for W&B's own process, which writes the file
    data, place, parts = path.read_bytes(), FILE_HEADER, b""
    assert data[:4] == b":W&B"
    while place + HEADER <= len(data):
        if (left := BLOCK - place % BLOCK) < HEADER:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
            parts = b""


def logged(run: Path) -> list[list[dict[str, Any]]]:
    """The lines in each of a run's files, without W&B's own numbers, but for the step."""
    found = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        history = [record.history.item for record in records(path) if record.HasField("history")]
        rows = [
            {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items} for items in history
        ]
        assert all(row["_step"] == row["step"] for row in rows)
        found.append([{name: v for name, v in row.items() if name[0] != "_"} for row in rows])
    return found


def test_the_same_names_and_numbers(cache: Path, tmp_path: Path, offline: Any) -> None:
    config = configure(cache, tmp_path / "run", steps=5, log_every=2, log_to_wandb=True)
    train(config)
    (found,) = logged(config.run)
    assert [line.keys() for line in found] == [line.keys() for line in lines(config.run)]
    assert found == lines(config.run)


def test_a_resumed_run_goes_on_in_the_same_wandb_run(cache: Path, tmp_path: Path, offline: Any) -> None:
    config = configure(cache, tmp_path / "run", steps=6, log_to_wandb=True)
    cut_short(config, after=4)
    train(config, resume=True)
    before, after = logged(config.run)
    assert before + after == lines(config.run)
    assert len(before) == 4
    files = config.run.glob("wandb/offline-run-*/*.wandb")
    assert {path.stem for path in files} == {f"run-{(config.run / 'wandb' / 'id').read_text()}"}


def test_the_runs_of_a_sweep_log_apart(cache: Path, tmp_path: Path, offline: Any) -> None:
    names = ["low", "high"]
    configs = [
        configure(cache, tmp_path / "sweep" / name, steps=2, log_to_wandb=True, lr=lr)
        for name, lr in zip(names, (1e-3, 1e-2), strict=True)
    ]
    sweep(tmp_path / "sweep", [Entry(name, {}) for name in names], configs, resume=False)
    for config in configs:
        assert logged(config.run) == [lines(config.run)]


def test_wandb_is_told_the_settings_and_the_name(cache: Path, tmp_path: Path, offline: Any) -> None:
    config = configure(cache, tmp_path / "a run", steps=1, log_to_wandb=True)
    train(config)
    (path,) = config.run.glob("wandb/offline-run-*/*.wandb")
    (run,) = [record.run for record in records(path) if record.HasField("run")]
    assert (run.project, run.display_name) == ("clt", "a run")
    told = {update.key: json.loads(update.value_json) for update in run.config.update}
    settings = json.loads((config.run / "config.json").read_text())
    assert {name: told.get(name) for name in settings} == settings


def test_numbers_that_are_not_finite_are_logged_as_they_are(
    cache: Path, tmp_path: Path, offline: Any
) -> None:
    (tmp_path / "run").mkdir()
    run = WandbRun(configure(cache, tmp_path / "run"))
    run.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    run.close(failed=True)
    ((line,),) = logged(tmp_path / "run")
    assert math.isnan(line["loss"])
    assert line["grad_norm"] == math.inf


def test_without_the_package_the_run_does_not_begin(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = configure(cache, tmp_path / "run", steps=1, log_to_wandb=True)
    with pytest.raises(
        ValueError, match=r"expected the package wandb, found none; `pip install '\.\[wandb\]'`"
    ):
        train(config)
    assert not config.run.exists()


def test_a_refusal_by_wandb_says_what_to_do_and_the_run_can_go_on(
    cache: Path, tmp_path: Path, offline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without a login where nobody can be asked."""

    def refuse(**settings: Any) -> None:
        raise offline.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    config = configure(cache, tmp_path / "run", steps=1, log_to_wandb=True)
    with monkeypatch.context() as patch:
        patch.setattr(offline, "init", refuse)
        with pytest.raises(ValueError, match=r"wandb login.* WANDB_MODE=offline .* --resume"):
            train(config)
    assert train(config, resume=True).steps == 1
