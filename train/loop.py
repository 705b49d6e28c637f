"""`clt train`: cache in, run folder out. The loop reads each step's batches once, for one run or for many."""

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..cache_format import open_cache
from ..cache_format.layout import parse_layers
from ..progress import Progress
from ..remote.address import remote_address
from ..remote.staging import Stage
from ..stopping import StopRequested
from .announcement import announce, sink_warning
from .checkpoint import checkpoint_folder
from .config import TrainConfig
from .evaluate import Evaluation, evaluate_all
from .exchange import ALONE, RankExchange
from .finite import DivergedError
from .job import Job, joined
from .meter import Meter
from .ranks import Mesh
from .reader import Reader
from .run import Reading, Run, new_run, say, sizes_of_step
from .selection import Selection
from .shape import Shape
from .source import NoTokensError, Source
from .wandb_run import require_wandb


class TrainReport(NamedTuple):
    run: Path
    steps: int
    tokens: int
    fvu: float | None
    """Mean over layers, of the last step; None where the run was complete already."""
    seconds: float
    """Of the steps of this process, checkpoints included"""
    stall: float
    """Share of them spent waiting for the cache"""
    held_out: dict[str, Any] | None
    """As `Evaluation.to_json`; None where split val has no tokens"""


def train(config: TrainConfig, resume: bool = False) -> TrainReport:
    """Fit a transcoder; with `resume`, go on from the run's latest checkpoint.

    Under torchrun this process is one of the ranks that do so together; each returns the same, timings aside.
    """
    if config.log_to_wandb:
        require_wandb()
    with joined(config.run, config.device) as job:
        return _train(config, resume, job)


def _train(config: TrainConfig, resume: bool, job: Job | None) -> TrainReport:
    source = open_source(config, "train")
    if config.save_best:
        require_held_out(config)
    exchange = ALONE if job is None else _meet(config, source, job)
    again = job is not None and job.restarted and (config.run / "config.json").exists()
    resume = exchange.anyone(resume or again)
    run = new_run(config, source, resume, exchange)
    state = run.begin(resume)
    say(announce(config, source, run.model, run.plan, run.step, exchange.mesh))
    if warning := sink_warning(source):
        say(warning)
    with new_reader(config, source, exchange.mesh) as reader, run:
        if state is not None:
            reader.restore(state)
        meter = Meter(exchange, reader, run.tokens)
        seconds = Loop([run], reader).go()
        if text := meter.report(run.model.shape, config, run.tokens, seconds):
            say(text)
        (held_out,) = held_out_numbers([run])
        run.write_report(held_out)
    found = None if isinstance(held_out, str) else held_out.to_json(source.layers)
    return TrainReport(config.run, run.step, run.tokens, run.fvu, seconds, reader.waited / seconds, found)


def _meet(config: TrainConfig, source: Source, job: Job) -> RankExchange:
    """Share the layers out; from here on the source reads those of this rank."""
    if config.offload != "none" and config.transcoder.tie == "source":
        raise ValueError("--offload of decoders tied by source: expected one process, found torchrun")
    shape = Shape.of(config.transcoder, source.layers, source.manifest.d_model)
    mesh = Mesh.of(shape, job.world, job.rank)
    job.names = [each.name(shape) for each in mesh.everyone]
    source.own = mesh.own
    return RankExchange(shape, mesh)


def new_reader(config: TrainConfig, source: Source, mesh: Mesh | None = None) -> Reader:
    return Reader(
        source,
        buffer_tokens=config.buffer_tokens,
        seed=config.read_seed,
        threads=config.threads,
        order=config.order,
        rank=mesh.replica if mesh else 0,
        world_size=mesh.replicas if mesh else 1,
        epochs=math.ceil(config.epochs),
        shuffle_windows=source.mixed_windows(config.shuffle_windows),
    )


def open_source(config: TrainConfig, split: str, caches: tuple[Path, ...] | None = None) -> Source:
    """The tokens of a split that the config chooses."""
    paths = caches or config.caches
    if not paths:
        raise ValueError(f"{config.run} was imported and has no cache of its own; name one with --cache")
    stage = None
    if any(remote_address(path) for path in paths):
        folder = config.stage_dir or config.run.parent / "staged"
        folder /= f"rank-{os.environ['RANK']}" if "RANK" in os.environ else ""  # each has its own layers
        stage = Stage(paths, split, folder, int(config.stage_gb * 1e9))
        paths = tuple(stage.folders)
    held = open_cache(paths[0], io=config.io, check=False).manifest.layers
    layers = parse_layers(config.layers, held)
    share = config.keep_kind if split == "train" else ()
    selection = Selection(config.kinds, config.exclude, config.exclude_token_ids, share, config.read_seed)
    return Source(paths, split, layers=layers, selection=selection, io=config.io, stage=stage)


def held_out_numbers(runs: Sequence[Run]) -> list[Evaluation | str]:
    """Each run's transcoder on split val, read once; or why there is none."""
    config = runs[0].config
    try:
        source = open_source(config, "val")
    except NoTokensError as missing:
        return [str(missing)] * len(runs)
    exchange, source.own = runs[0].exchange, runs[0].source.own
    with Progress("held out", total=source.n_tokens, unit="tok", quiet=not exchange.first) as progress:

        def after_batch(tokens: int) -> None:
            progress.add(tokens)
            exchange.check_stop()

        models, threads = [run.model for run in runs], config.threads
        return [*evaluate_all(models, source, threads=threads, after_batch=after_batch, exchange=exchange)]


def _held_out_fvus(runs: Sequence[Run]) -> list[float]:
    """Means over layers, on split val, which has tokens."""
    found = [float(held.fvu.mean()) for held in held_out_numbers(runs) if isinstance(held, Evaluation)]
    say(f"step {runs[0].step}: held-out FVU {' '.join(f'{fvu:.4f}' for fvu in found)}")
    return found


def require_held_out(config: TrainConfig) -> None:
    try:
        open_source(config, "val")
    except NoTokensError as missing:
        raise ValueError(f"--save-best: expected held-out tokens; {missing}") from missing


def _fail(run: Run, fault: DivergedError) -> None:
    raise fault


class Loop:
    """Steps of runs that share everything which decides what tokens a step holds.

    Runs that were killed between the saves of two of them stand at different steps: the loop begins at the
    earliest, where the reader has to stand, and the others wait until it has come to them.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        reader: Reader,
        on_divergence: Callable[[Run, DivergedError], None] = _fail,
    ) -> None:
        """on_divergence: told of a run that is given up; raises where the others are not to go on."""
        self.runs, self.reader, self._on_divergence = list(runs), reader, on_divergence
        self.config, self.plan, self._exchange = runs[0].config, runs[0].plan, runs[0].exchange
        self.step, self.tokens = min((run.step, run.tokens) for run in runs)

    def go(self) -> float:
        """Step until the plan is fulfilled or a signal asks to stop; saves in both cases. The seconds."""
        began, plan = time.monotonic(), self.plan
        if self.step >= plan.steps:
            return max(time.monotonic() - began, 1e-9)
        quiet = not self._exchange.first
        with Progress("train", total=plan.tokens, unit="tok", done=self.tokens, quiet=quiet) as progress:
            try:
                while self.step < plan.steps and self.runs:
                    before = self.tokens
                    self.take_step()
                    progress.add(self.tokens - before, f"step {self.step}/{plan.steps}, {self._fvus()}")
                    if self.step % self.config.save_every == 0 and self.step < plan.steps:
                        self.save()
                    self._exchange.check_stop()
            except StopRequested:
                self.save(measure=False)
                saved = [str(checkpoint_folder(run.config.run)) for run in self.runs]
                others = f" and those of {len(saved) - 1} other runs" if len(saved) > 1 else ""
                say(f"stopped; {saved[0]}{others} is saved, go on with --resume")
                raise
            self.save()
        return time.monotonic() - began

    def take_step(self) -> None:
        """Read the batches of one step, and let every run that stands before it take it."""
        began, waited = time.monotonic(), self.reader.waited
        left = self.plan.tokens - self.tokens
        batches = [self.reader.next(size) for size in sizes_of_step(self.config, left)]
        if len(self.runs) > 1:
            batches = [batch.to(self.runs[0].device) for batch in batches]
        reading = Reading(time.monotonic() - began, self.reader.waited - waited)
        for run in self._due():
            self._attempt(run, lambda run=run: run.take_step(batches, reading))  # type: ignore[misc]
        self.step, self.tokens = self.step + 1, self.tokens + sum(len(batch.all_tokens) for batch in batches)

    def save(self, measure: bool = True) -> None:
        """Of every run that stands here; one that waits ahead was saved there. measure: held-out FVU too."""
        state = self.reader.state()
        due = self._due()
        fvus: Sequence[float | None] = [None] * len(due)
        if self.config.save_best and measure and due:
            fvus = _held_out_fvus(due)
        for run, fvu in zip(due, fvus, strict=True):
            self._attempt(run, lambda run=run, fvu=fvu: run.save(state, fvu))  # type: ignore[misc]

    def _due(self) -> list[Run]:
        return [run for run in self.runs if run.step == self.step]

    def _attempt(self, run: Run, act: Callable[[], None]) -> None:
        try:
            act()
        except DivergedError as fault:
            self._on_divergence(run, fault)
            self.runs.remove(run)

    def _fvus(self) -> str:
        known = [run.fvu for run in self.runs if run.fvu is not None]
        if len(known) > MOST_SHOWN:
            return f"FVU {min(known):.3f} to {max(known):.3f} of {len(known)} runs"
        return f"FVU {' '.join(f'{fvu:.3f}' for fvu in known)}"


MOST_SHOWN = 8
"""Runs whose FVU is beside the progress bar, in the runs' order."""
