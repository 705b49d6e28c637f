"""Processes that write one cache: together the tokens of one, each with a state of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from clt.cache_format import open_cache, verify_cache
from clt.harvest.config import HarvestConfig
from clt.harvest.run import harvest

SLOW = """
import sys, time
from clt.harvest.taps import MlpTaps
take = MlpTaps.run
def slow(self, *args):
    time.sleep(0.1)
    return take(self, *args)
MlpTaps.run = slow
sys.argv[0] = "clt"
from clt.cli import main
main()
"""
OPTIONS = {"window": 64, "val_fraction": 0.3, "batch_tokens": 70}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    tiny.save_llava(root / "model")
    tiny.write_dataset(root / "data", n_pictures=8, n_texts=9)
    return root


def configure(folder: Path, cache: Path, **options: Any) -> HarvestConfig:
    dataset = str(folder / "data" / "train.jsonl")
    return HarvestConfig(model=str(folder / "model"), dataset=dataset, cache=cache, **{**OPTIONS, **options})


def arguments(folder: Path, cache: Path) -> list[str]:
    return [
        *("harvest", str(folder / "model"), str(folder / "data" / "train.jsonl"), str(cache)),
        *("--window", "64", "--val-fraction", "0.3", "--batch-tokens", "70"),
    ]


def tokens_of(cache: Path) -> set[tuple[Any, ...]]:
    """(split, sample's id, position, token, kind, row, col) of all that is stored, each once."""
    opened = open_cache(cache)
    names = {number: line["id"] for number, line in opened.samples().items()}
    found: list[tuple[Any, ...]] = []
    for split in ("train", "val"):
        columns = opened[split].tokens()
        for number, *rest in zip(
            *(columns[name].tolist() for name in ("sample", "position", "token_id", "kind", "row", "col")),
            strict=True,
        ):
            found.append((split, names[number], *rest))
    assert len(set(found)) == len(found)
    return set(found)


def test_a_dead_rank_is_resumed_alone(folder: Path, tmp_path: Path) -> None:
    """Two processes, told apart as torchrun does; one is killed, the other goes on to its end. The dead one,
    started again, finishes the cache and touches no file of its neighbour."""
    harvest(configure(folder, tmp_path / "one"))
    cache = tmp_path / "two"
    ranks = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, "-c", SLOW, *arguments(folder, cache)]
        ranks.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    journal = cache / "journal-00001.jsonl"
    while ranks[1].poll() is None and not (journal.exists() and journal.read_text().count("\n") >= 2):
        time.sleep(0.01)
    os.kill(ranks[1].pid, signal.SIGKILL)
    said, _ = ranks[0].communicate(timeout=300)
    ranks[1].communicate()
    assert ranks[0].returncode == 0, said
    assert "rank 0 of 2: " in said
    assert ranks[1].returncode == -signal.SIGKILL, "the test was too slow to interrupt"
    cut = open_cache(cache)
    assert not cut.complete
    assert {entry.window % 2 for entry in cut.windows} == {0, 1}
    before = {
        cache / name: ((cache / name).read_bytes(), (cache / name).stat().st_mtime_ns)
        for entry in cut.windows
        if entry.window % 2 == 0
        for name in entry.files
    }
    harvest(configure(folder, cache, rank=1, world_size=2))
    assert open_cache(cache).complete
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == was for path, was in before.items())
    assert verify_cache(str(cache), full=True) == []
    assert tokens_of(cache) == tokens_of(tmp_path / "one")


@pytest.mark.parametrize("tokens", [100, 101])
def test_ranks_share_the_tokens_asked_for(folder: Path, tmp_path: Path, tokens: int) -> None:
    reports = [
        harvest(configure(folder, tmp_path / "c", tokens=tokens, rank=rank, world_size=2))
        for rank in range(2)
    ]
    assert sum(report.tokens["train"] for report in reports) == tokens
    assert len(open_cache(tmp_path / "c")["train"]) == tokens


@pytest.mark.slow
def test_torchrun(folder: Path, tmp_path: Path) -> None:
    """As the README says it: the same tokens as one process."""
    harvest(configure(folder, tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "clt.cli", *arguments(folder, tmp_path / "two")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2: " in done.stdout
    assert open_cache(tmp_path / "two").complete
    assert tokens_of(tmp_path / "two") == tokens_of(tmp_path / "one")
