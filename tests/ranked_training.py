"""Runs of several ranks each, in processes forked from one that has imported torch.

python ranked_training.py JOBS.json     # [{"world": 2, "config": {...}, "resume": false}, ...]
"""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from clt.train.config import config_from_json
from clt.train.loop import train


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def train_rank(rank: int, jobs: list[dict[str, Any]]) -> None:
    """Every job of one world size, one after the other."""
    torch.set_num_threads(1)
    for job in jobs:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["world"]),
            "LOCAL_WORLD_SIZE": str(job["world"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(job["port"]),
        }
        train(config_from_json(job["config"]), job.get("resume", False))


def fork(rank: int, jobs: list[dict[str, Any]]) -> int:
    child = os.fork()
    if child == 0:
        try:
            train_rank(rank, jobs)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return child


def main(jobs: list[dict[str, Any]]) -> int:
    for job in jobs:
        job["port"] = free_port()
    for world in sorted({job["world"] for job in jobs}):
        mine = [job for job in jobs if job["world"] == world]
        children = [fork(rank, mine) for rank in range(world)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
