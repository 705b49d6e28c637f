"""Trains, dying or failing at a chosen moment. Run as `python killed_training.py CONFIG_RUN FIRST STEP LAST`.

Everything that changes the disk in a save, every micro-batch that is read and every layer that is updated is
a moment, counted from 0. For each of the moments FIRST, FIRST + STEP, ... a child of its own is killed there,
and a second one resumes and finishes. Children are forked before torch has threads; torch is imported once.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clt.train import checkpoint, loop
from clt.train.optimizer import Optimizer
from clt.train.reader import Reader
from clt.train.run_folder import load_config


class Moments:
    """Counts; at number `at`, calls `act` with the arguments, in place of what was to be done."""

    def __init__(self, at: int, act: Callable[..., None]) -> None:
        self.at, self.act, self.names = at, act, []  # type: ignore[var-annotated]

    def watch(self, owner: Any, name: str) -> None:
        done = getattr(owner, name)

        def watched(*args: Any, **named: Any) -> Any:
            self.names.append(name)
            if len(self.names) - 1 == self.at:
                self.act(name, *args)
            return done(*args, **named)

        setattr(owner, name, watched)

    def watch_all(self) -> None:
        for owner, name in (
            (os, "replace"),
            (os, "fsync"),
            (checkpoint, "save_file"),
            (checkpoint.shutil, "rmtree"),
            (Path, "write_text"),
            (Path, "mkdir"),
            (Reader, "next"),
            (Optimizer, "apply"),
        ):
            self.watch(owner, name)


def die(name: str, *args: Any) -> None:
    """SIGKILL, after half of a file was written, or one file of a folder was removed."""
    if name == "save_file":
        args[1].write_bytes(b"\x00" * 7)
    if name == "rmtree" and args[0].exists():
        next(path for path in args[0].rglob("*") if path.is_file()).unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], None]) -> int:
    """How a child that does `work` ends: minus the signal, or its exit code."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(whole: Path, first: int, step: int, last: int) -> None:
    config = load_config(whole)
    for at in range(first, last, step):
        cut = replace(config, run=whole.with_name(f"{whole.name}-{at}"))

        def killed(at: int = at, cut: Any = cut) -> None:
            Moments(at, die).watch_all()
            loop.train(cut)

        ended = in_child(killed)
        begun = (cut.run / "config.json").exists()
        resumed = in_child(lambda cut=cut, begun=begun: loop.train(cut, resume=begun))  # type: ignore[misc]
        print(json.dumps({"at": at, "ended": ended, "resumed": resumed}), flush=True)
        if ended == 0:  # there is no such moment any more
            shutil.rmtree(cut.run)
            break


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(number) for number in sys.argv[2:5]))
