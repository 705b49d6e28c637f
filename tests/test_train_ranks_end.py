"""How a run of many ranks ends: killed, failed, stopped. All processes end soon, and one says why."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planted import write_planted
from test_train_ranks import configure, job, require_same, start, tensors

from clt.train.loop import train

ERROR = re.compile(r"error: .*")
"""Lines of two processes may run into each other."""
BOUND = 60.0
"""Seconds, on a busy machine; a hang would last for 30 minutes."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 1500, layers=3)


def arguments(cache: Path, run: Path, *more: str) -> list[str]:
    options = "--k 4 --latents 40 --n-targets 3 --batch-tokens 61 --buffer-tokens 640 --threads 1 --lr 5e-3"
    options += " --lr-warmup-steps 5 --epochs 9 --steps 50 --dtype float64"
    return ["train", str(cache), "--run-name", "x", "--out", str(run), *options.split(), *more]


def test_a_fault_of_one_rank_ends_all_with_its_words(cache: Path, tmp_path: Path) -> None:
    """NaN in one rank's layer; a damaged file that only one rank reads; a run that exists."""
    damaged = tmp_path / "damaged"
    shutil.copytree(cache, damaged)
    for path in damaged.glob("train/mlp_out/c.*.2.0"):
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    jobs = [
        {"world": 3, "argv": arguments(cache, tmp_path / "nan", "--lr", "1e30", "--dtype", "float32")},
        {"world": 3, "argv": arguments(damaged, tmp_path / "damage")},
        {"world": 2, "argv": arguments(cache, tmp_path / "there")},
    ]
    began = time.monotonic()
    codes, errors = start(tmp_path, jobs)
    assert time.monotonic() - began < BOUND
    assert codes[0] == [2, 2, 2]
    assert sorted(codes[1]) == [1, 2, 2]
    assert codes[2] == [2, 2]
    said = ERROR.findall(errors)
    assert len(said) == 3, errors
    assert "not finite in layer" in said[0]
    assert "The run is stopped, there is no checkpoint" in said[0]
    assert "layer 2, site mlp_out" in said[1]
    assert "exists; choose another --run-name" in said[2]
    assert "Traceback" not in errors


def test_what_many_ranks_cannot_do_is_refused_in_one_line(cache: Path, tmp_path: Path) -> None:
    """Sweeps, and decoders tied by source that are away."""
    (tmp_path / "s.toml").write_text("[grid]\nlr = [1e-3, 2e-3]\n")
    sweep = ("--sweep", str(tmp_path / "s.toml"))
    away = ("--offload", "host", "--tie", "source")
    jobs = [{"world": 2, "argv": arguments(cache, tmp_path / "r", *more)} for more in (sweep, away)]
    codes, errors = start(tmp_path, jobs)
    assert codes == [[2, 2], [2, 2]]
    said = ERROR.findall(errors)
    assert any("--sweep: expected one process, found torchrun" in line for line in said), errors
    assert any("--offload of decoders tied by source: expected one process" in line for line in said), errors
    assert "Traceback" not in errors


def torchrun(ranks: int, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *words], stderr=subprocess.PIPE, text=True, env=environment)


def ranks_of(agent: int) -> dict[int, int]:
    """Process by rank."""
    found = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
        found |= {rank: int(child) for rank in ranks}
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


SLOW_STEPS = """
import time
import clt.train.run as run
step = run.Run.take_step
def slow(*args):
    time.sleep(0.05)
    return step(*args)
run.Run.take_step = slow
from clt.cli import main
main()
"""


@pytest.fixture
def slowly(tmp_path: Path) -> str:
    """A script that is `clt` with slow steps, so that there is time to interrupt it."""
    (tmp_path / "slowly.py").write_text(SLOW_STEPS)
    return str(tmp_path / "slowly.py")


def test_a_killed_rank_is_named_and_torchrun_goes_on_without_a_word(
    cache: Path, tmp_path: Path, slowly: str
) -> None:
    """SIGKILL to the second of two: its name is told once; started again, the run ends as it would have."""
    whole = configure(cache, tmp_path / "whole")
    train(whole)
    run = tmp_path / "cut"
    words = arguments(cache, run, "--save-every", "7")
    agent = torchrun(2, "--max-restarts", "1", slowly, *words)
    wait_for((run / "latest").exists)
    os.kill(ranks_of(agent.pid)[1], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = agent.communicate(timeout=2 * BOUND)
    assert time.monotonic() - killed < 2 * BOUND
    assert agent.returncode == 0, errors
    said = ERROR.findall(errors)
    assert len(said) == 1, errors
    assert "rank 1 of 2 (layers " in said[0]
    assert "is gone" in said[0]
    assert "go on with --resume" in said[0]
    assert "goes on after step" in errors
    require_same(whole.run, run, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_ranks_stop_at_one_step(cache: Path, tmp_path: Path, slowly: str, number: signal.Signals) -> None:
    """They save together, one says so, and the run goes on bit for bit as it would have."""
    runs = [tmp_path / name for name in ("whole", "cut")]
    config = configure(cache, runs[0])
    agent = torchrun(2, slowly, *arguments(cache, runs[1], "--save-every", "7"))
    wait_for((runs[1] / "latest").exists)
    agent.send_signal(number)
    _, errors = agent.communicate(timeout=BOUND)
    assert errors.count("is saved, go on with --resume") == 1
    assert errors.count("error: interrupted") == 1
    stopped = (runs[1] / "latest").read_text()
    assert stopped != "step-00000050"
    again = {"world": 2, "argv": arguments(cache, runs[1], "--save-every", "7", "--resume")}
    codes, errors = start(tmp_path, [job(2, config), again])
    assert codes == [[0, 0], [0, 0]], errors
    whole, cut = (tensors(run) for run in runs)
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
    lines = [json.loads(line)["step"] for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 51))


@pytest.mark.slow
def test_a_rank_that_does_not_answer_ends_the_job(cache: Path, tmp_path: Path, slowly: str) -> None:
    """A process that stands still, as after a machine is lost: its watch does not beat, the others end."""
    run = tmp_path / "run"
    agent = torchrun(2, slowly, *arguments(cache, run, "--save-every", "7"))
    wait_for((run / "latest").exists)
    ranks = ranks_of(agent.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    try:
        _, errors = agent.communicate(timeout=240)
    finally:
        for process in ranks.values():
            if Path(f"/proc/{process}").exists():
                os.kill(process, signal.SIGKILL)
    assert time.monotonic() - began < 240
    assert "error: rank 1 of 2 (layers " in errors
    assert agent.returncode != 0
