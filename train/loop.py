"""`clt train`: cache in, run folder out."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..cache_format import open_cache
from ..cache_format.layout import parse_layers
from ..progress import Progress
from ..stopping import StopRequested
from .announcement import announce, sink_warning
from .checkpoint import LATEST, TrainerState, checkpoint_folder, restore_training, save_checkpoint
from .config import TrainConfig
from .evaluate import Evaluation, evaluate
from .finetune import start_from
from .finite import NotFiniteError, require_finite_loss, require_finite_weights
from .losses import Extras
from .metrics import DeadLatents, FiringCounts
from .optimizer import Optimizer, learning_rate
from .origin import save_origin
from .plan import annealed, plan
from .reader import Batch, Reader
from .report_page import write_page
from .run_folder import begin_run
from .run_log import RunLog
from .run_report import Place, report_run
from .selection import Selection
from .source import NoTokensError, Source
from .step import train_step
from .transcoder import CrossLayerTranscoder, new_transcoder
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


class _Run:
    """What the loop carries."""

    def __init__(self, config: TrainConfig, source: Source, model: CrossLayerTranscoder) -> None:
        self.config, self.source, self.model = config, source, model
        self.plan = plan(config, source, model.shape.n_latents)
        self.optimizer = Optimizer(model, config.optimizer, config.seed, config.max_grad_norm)
        self.reader = Reader(
            source,
            buffer_tokens=config.buffer_tokens,
            seed=config.seed,
            threads=config.threads,
            order=config.order,
        )
        self.dead = DeadLatents(model, self.plan.dead_after)
        self.firing = FiringCounts(model, self.plan.dead_after)
        self.step = self.tokens = 0
        self.lr = self.plan.lr
        self.log: RunLog
        """Opened once it is clear which lines of a resumed run stay"""

    def restore(self, folder: Path) -> None:
        state = restore_training(folder, self.model, self.optimizer)
        self.step, self.tokens, self.dead.since = state.step, state.tokens, state.tokens_since_fired
        self.firing.restore(state.firing)
        self.reader.restore(state.reader)

    def write_line(self) -> None:
        k = self.model.shape.layer_k and self.k(max(self.step - 1, 0))
        self.log.write(self.step, self.tokens, self.lr, sum(k) / len(k) if k else None, self.dead)

    def k(self, step: int) -> tuple[int, ...]:
        """By layer, of one optimiser step 0, 1, ..."""
        shape = self.model.shape
        return tuple(annealed(k, step, self.config.k_anneal_steps, shape.n_latents) for k in shape.layer_k)

    def extras(self) -> Extras:
        """What the next step does beside FVU."""
        config, dead = self.config, None
        if config.auxk_alpha or config.dead_latent_penalty:
            dead = (self.dead.since >= self.dead.after_tokens).to(self.model.inputs.mean.device)
        return Extras(
            sparsity=(config.sparsity_coeff or 0.0) * (self.step + 1) / self.plan.steps,
            auxk=config.auxk_alpha,
            dead_latents=config.dead_latent_penalty,
            dead=dead,
            k=self.k(self.step),
        )

    def save(self) -> Path:
        """A checkpoint, and a line of metrics.jsonl before it, so that no line is about both sides of it."""
        with _stops_where_not_finite(self):
            require_finite_weights(self.model)
        self.write_line()
        state = TrainerState(
            self.step, self.tokens, self.reader.state(), self.dead.since, self.firing.state()
        )
        folder = save_checkpoint(self.config.run, self.model, self.optimizer, state, self.config.keep)
        self.write_report("Held-out numbers are measured when the run is complete.")
        return folder

    def write_report(self, held_out: Evaluation | str) -> None:
        """report.html as of now; held_out: or why there is no evaluation."""
        place = Place(self.step, self.plan.steps, self.tokens)
        curves = self.log.curves
        report = report_run(self.config, self.source, self.model, place, curves, self.firing, held_out)
        write_page(self.config.run / "report.html", report)


def train(config: TrainConfig, resume: bool = False) -> TrainReport:
    """Fit a transcoder; with `resume`, go on from the run's latest checkpoint."""
    if config.log_to_wandb:
        require_wandb()
    source = open_source(config, "train")
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, config.dtype)
    model = new_transcoder(config.transcoder, source, dtype, config.seed).to(device)
    if config.finetune and not (resume and (config.run / LATEST).exists()):
        for note in start_from(model, config.finetune):
            _say(note)
    resume = begin_run(config, resume)
    save_origin(config.run, source.manifest.source, source.manifest.seed)
    run = _Run(config, source, model)
    if resume:
        run.restore(checkpoint_folder(config.run))
    model.outputs.measure(source.statistics("mlp_out").variance)
    _say(announce(config, source, model, run.plan, run.step))
    if warning := sink_warning(source):
        _say(warning)
    with run.reader, RunLog(config, source, model, run.step) as run.log:
        began = time.monotonic()
        fvu = _loop(run) if run.step < run.plan.steps else None
        seconds = time.monotonic() - began
        held_out = _held_out(run)
        run.write_report(held_out)
    found = None if isinstance(held_out, str) else held_out.to_json(source.layers)
    return TrainReport(config.run, run.step, run.tokens, fvu, seconds, run.reader.waited / seconds, found)


def _loop(run: _Run) -> float:
    """Step until the plan is fulfilled or a signal asks to stop; saves in both cases. The last step's FVU."""
    config, plan, fvu = run.config, run.plan, math.nan
    with Progress("train", total=plan.tokens, unit="tok", done=run.tokens) as progress:
        try:
            while run.step < plan.steps:
                fvu = _one_step(run, progress)
                if run.step % config.log_every == 0:
                    run.write_line()
                if run.step % config.save_every == 0 and run.step < plan.steps:
                    run.save()
                StopRequested.check()
        except StopRequested:
            _say(f"stopped; {run.save()} is saved, go on with --resume")
            raise
    run.save()
    return fvu


def _held_out(run: _Run) -> Evaluation | str:
    """The final transcoder on split val, or why there is none."""
    try:
        source = open_source(run.config, "val")
    except NoTokensError as missing:
        return str(missing)
    with Progress("held out", total=source.n_tokens, unit="tok") as progress:

        def after_batch(tokens: int) -> None:
            progress.add(tokens)
            StopRequested.check()

        return evaluate(run.model, source, threads=run.config.threads, after_batch=after_batch)


def open_source(config: TrainConfig, split: str, caches: tuple[Path, ...] | None = None) -> Source:
    """The tokens of a split that the config chooses."""
    paths = caches or config.caches
    if not paths:
        raise ValueError(f"{config.run} was imported and has no cache of its own; name one with --cache")
    held = open_cache(paths[0], io=config.io, check=False).manifest.layers
    layers = parse_layers(config.layers, held)
    share = config.keep_kind if split == "train" else ()
    selection = Selection(config.kinds, config.exclude, config.exclude_token_ids, share, config.seed)
    return Source(paths, split, layers=layers, selection=selection, io=config.io)


def _one_step(run: _Run, progress: Progress) -> float:
    """Read, step, log; the step's mean FVU."""
    config, plan = run.config, run.plan
    began, waited = time.monotonic(), run.reader.waited
    batches = _read(run)
    run.lr = learning_rate(run.step, plan.lr, plan.warmup, plan.steps, config.lr_schedule)
    run.optimizer.begin(run.step, run.lr)
    with _stops_where_not_finite(run):
        result = train_step(run.model, batches, run.optimizer.apply, config.fvu_variance, run.extras())
        require_finite_loss(result.fvu, run.source.layers)
    tokens = sum(len(batch) for batch in batches)
    run.step, run.tokens = run.step + 1, run.tokens + tokens
    run.dead.update(result.fired, tokens)
    run.firing.update(result.fired, tokens)
    seconds = time.monotonic() - began
    fvu = float(result.fvu.mean())
    norm = run.optimizer.grad_norm
    run.log.add(result, batches, grad_norm=norm, seconds=seconds, waited=run.reader.waited - waited)
    progress.add(tokens, f"step {run.step}/{plan.steps}, FVU {fvu:.3f}")
    return fvu


@contextmanager
def _stops_where_not_finite(run: _Run) -> Iterator[None]:
    """Within, NaN or infinity ends the run with words on what is left of it."""
    try:
        yield
    except NotFiniteError as fault:
        latest = run.config.run / LATEST
        kept = f"{latest.read_text()} is its last checkpoint" if latest.exists() else "there is no checkpoint"
        raise ValueError(
            f"step {run.step + 1}: {fault}. The run is stopped, {kept}; lower --lr, set --max-grad-norm, or "
            "look at that layer with `clt info`"
        ) from fault


def _read(run: _Run) -> list[Batch]:
    """The micro-batches of one step; the run's last step may be shorter."""
    left = min(run.config.step_tokens, run.plan.tokens - run.tokens)
    sizes = [run.config.batch_tokens] * (left // run.config.batch_tokens)
    if left % run.config.batch_tokens:
        sizes.append(left % run.config.batch_tokens)
    return [run.reader.next(size) for size in sizes]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
