"""The processes of one run, started together by torchrun: who has gone, and how the others learn of it.

Each rank's watch counts up a number in the job's store, and looks there for a fault. A rank that fails says
so in the store before it ends. One that is killed says nothing: the others find that it does not answer, that
its number stands still, and name it. Nobody waits for ever: who cannot end by itself is ended by its watch.
"""

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..devices import find_device
from ..stopping import EndedByOthers, StopRequested
from .exchange import LostTouch

BEAT = 0.5
"""Seconds between two looks at the store."""
SILENCE = 5.0
"""Seconds without a beat after which a rank that does not answer counts as gone."""
LONG_SILENCE = 120.0
"""The same of a rank that nobody waits for."""
GRACE = 10.0
"""Seconds that a rank has to end by itself once there is a fault."""
BAD_END, INTERRUPTED = 2, 130
"""Exit codes of ranks that have nothing to say of their own."""
ANSWER = timedelta(minutes=30)
"""How long a rank waits for one that lives, which may be writing a checkpoint to a slow disk."""


def started_by_torchrun() -> bool:
    """Whether there are other processes of this run."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process is to print for its whole job."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


class Job:
    """One rank's place among all, and its watch."""

    def __init__(self) -> None:
        store, self.rank, self.world = next(rendezvous("env://"))
        self.names = [f"rank {rank} of {self.world}" for rank in range(self.world)]
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        """Whether torchrun has started the processes again after a failure, as far as this rank knows"""
        start = _name_of_start(store, self.rank, self.world)
        self._store, self._group = PrefixStore(f"{start}/clt", store), PrefixStore(f"{start}/group", store)
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look, name="clt-watch", daemon=True)

    def begin(self, device: str | None) -> None:
        """Meet the others; CUDA tensors go through NCCL, all others through gloo."""
        cuda = torch.cuda.is_available() if device is None else device.startswith("cuda")
        self._watch.start()
        if cuda:
            torch.cuda.set_device(find_device("cuda"))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=self._group,
            rank=self.rank,
            world_size=self.world,
            timeout=ANSWER,
        )

    def end(self) -> None:
        """All have done their part."""
        try:
            dist.all_reduce(torch.zeros(1))
        except RuntimeError as fault:
            raise LostTouch(str(fault)) from fault
        self._over.set()
        dist.destroy_process_group()

    def accuse(self, text: str) -> bool:
        """Leave the first fault of the job; whether it is this one."""
        mine = json.dumps([self.rank, text])
        try:
            return self._store.compare_set("fault", "", mine).decode() == mine
        except RuntimeError:  # the store is gone, and nobody else can be asked
            return True

    def who_is_gone(self) -> list[int]:
        """Ranks whose number stands still; takes SILENCE seconds unless there is a fault already.

        Without torchrun the store is in the first rank, and goes with it.
        """
        try:
            before, until = self._beats(), time.monotonic() + SILENCE
            while time.monotonic() < until and not self._store.check(["fault"]):
                time.sleep(BEAT / 2)
            return [rank for rank, beat in enumerate(self._beats()) if beat == before[rank]]
        except RuntimeError:
            return [0]

    def _beats(self) -> list[int]:
        return [self._store.add(f"beat/{rank}", 0) for rank in range(self.world)]

    def _look(self) -> None:
        """The watch's life. Where the main thread does not come back from its wait, it ends the process."""
        try:
            self._until_fault()
        except RuntimeError:
            if self._over.wait(GRACE):
                return
            _end("the process that holds the job together is gone (torchrun on the first machine)")
        if not self._over.wait(GRACE):
            _end(None)

    def _until_fault(self) -> None:
        beats, since = self._beats(), [time.monotonic()] * self.world
        while not self._over.wait(BEAT):
            self._store.add(f"beat/{self.rank}", 1)
            if self._store.check(["fault"]):
                return
            now = time.monotonic()
            for rank, beat in enumerate(self._beats()):
                if beat != beats[rank]:
                    beats[rank], since[rank] = beat, now
                elif now - since[rank] > LONG_SILENCE and self.accuse(_gone(self.names[rank])):
                    print(f"error: {_gone(self.names[rank])}", file=sys.stderr, flush=True)


def _name_of_start(store: Store, rank: int, world: int) -> str:
    """The same for all ranks, and unlike that of earlier starts, whose words are still in torchrun's store.

    torchrun counts its restarts by machine, not by job; so the first rank makes a name up and tells it to
    every rank that asks, until all have it. Those who asked before and were killed ask for ever in vain.
    """
    mine = secrets.token_hex(8)
    if rank:
        store.set(f"asks/{rank}", mine)
        while not store.check([f"answer/{mine}"]):
            _rest()
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/has/{rank}", "")
        return name
    missing = set(range(1, world))
    while missing:
        for other in [other for other in missing if store.check([f"asks/{other}"])]:
            store.set(f"answer/{store.get(f'asks/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"{mine}/has/{other}"])}
        _rest()
    return mine


def _rest() -> None:
    StopRequested.check()
    time.sleep(0.01)


@contextmanager
def joined(run: Path, device: str | None) -> Iterator[Job | None]:
    """Within, this process is one rank of a job; None where it is alone.

    Where a rank fails, all leave: it with its own error, the others with EndedByOthers. Where one is gone,
    one of the others raises ValueError with its name. StopRequested is the first rank's to tell.
    """
    if not started_by_torchrun():
        yield None
        return
    job = Job()
    try:
        job.begin(device)
        stopped = None
        try:
            yield job
        except StopRequested as request:
            stopped = request
        job.end()
    except LostTouch as fault:
        raise _after_silence(job, run, fault) from fault
    except BaseException as fault:
        if not job.accuse(f"{type(fault).__name__}: {fault}"):
            raise EndedByOthers(BAD_END) from fault
        raise
    if stopped is not None:
        raise stopped if job.rank == 0 else EndedByOthers(INTERRUPTED)


def _after_silence(job: Job, run: Path, fault: LostTouch) -> Exception:
    """What this rank raises when another did not answer."""
    gone = [job.names[rank] for rank in job.who_is_gone()]
    text = _gone(", ".join(gone)) if gone else f"{job.names[job.rank]} lost touch with the others: {fault}"
    latest = run / "latest"
    kept = f"{latest.read_text()} is the last checkpoint" if latest.exists() else "there is no checkpoint"
    text += f"; {kept}, go on with --resume (torchrun --max-restarts N does so by itself)"
    return ValueError(text) if job.accuse(text) else EndedByOthers(BAD_END)


def _gone(names: str) -> str:
    return f"{names} is gone: it was killed, or its machine is lost"


def _end(text: str | None) -> None:
    if text is not None:
        print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(BAD_END)
