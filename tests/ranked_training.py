"""Runs of several ranks each, in processes forked from one that has imported torch.

python ranked_training.py JOBS.json

A job is {"world": 2, "config": {...}, "resume": false}, with "copy": [run, step] to go on from that step of
another run; or {"world": 2, "argv": ["train", ...]}, as it is typed. Prints the exit codes of a job's ranks.
"""

import json
import os
import shutil
import signal
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from clt import cli
from clt.train.config import TrainConfig, config_from_json
from clt.train.loop import train
from clt.train.meter import Meter
from clt.train.shape import Shape


def work(rank: int, jobs: list[dict[str, Any]]) -> None:
    """One rank's part of jobs of one world size, one after the other."""
    torch.set_num_threads(1)
    keep_traffic()
    for job in jobs:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["world"]),
            "LOCAL_WORLD_SIZE": str(job["world"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(job["port"]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        if "argv" in job:
            sys.argv = ["clt", *job["argv"]]
            cli.main()
        if "copy" in job and rank == 0:  # the others wait for rank 0 at the start of `train`
            copy_run(*map(str, job["copy"]), job["config"]["run"])
        train(config_from_json(job["config"]), job.get("resume", False))


def keep_traffic() -> None:
    """Write what was sent and read, by rank, to a file beside the run."""
    measured = Meter.report

    def report(self: Meter, shape: Shape, config: TrainConfig, tokens: int, seconds: float) -> str | None:
        rows = []
        if os.environ["WORLD_SIZE"] != "1":
            rows = [each._asdict() | {"sent": each.sent._asdict()} for each in self.traffic(tokens, seconds)]
        if os.environ["RANK"] == "0":
            Path(f"{config.run}.traffic.json").write_text(json.dumps(rows))
        return measured(self, shape, config, tokens, seconds)

    Meter.report = report


def copy_run(run: str, step: str, to: str) -> None:
    """The run as it was right after that step was saved."""
    shutil.copytree(run, to)
    for folder in Path(to).glob("step-*"):
        if folder.name > step:
            shutil.rmtree(folder)
    (Path(to) / "latest").write_text(step)


def host_store() -> tuple[int, int]:
    """Process and port of a store that outlives the ranks, as torchrun's does; here no thread may run."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        while os.getppid() != 1:
            time.sleep(1)
        os._exit(0)
    return child, int(os.read(reading, 10))


def fork(rank: int, jobs: list[dict[str, Any]]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work(rank, jobs)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(70)
        os._exit(0)
    return child


def main(jobs: list[dict[str, Any]]) -> None:
    stores = []
    for number, job in enumerate(jobs):
        process, port = host_store()
        stores.append(process)
        job |= {"port": port, "number": number if "argv" in job else -1}
    for (world, _), group in groupby(jobs, key=lambda job: (job["world"], job["number"])):
        mine = list(group)
        children = [fork(rank, mine) for rank in range(world)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)
    for process in stores:
        os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
