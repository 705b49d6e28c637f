"""One run: a transcoder, its optimiser and its folder; given the batches of a step, it takes the step."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch

from ..devices import find_device
from .checkpoint import LATEST, TrainerState, checkpoint_folder, restore_training, save_checkpoint, tidy
from .config import TrainConfig
from .evaluate import Evaluation
from .exchange import ALONE, Exchange
from .finetune import start_from
from .finite import DivergedError, NotFiniteError, require_finite_loss, require_finite_weights
from .job import speaks
from .losses import Extras
from .metrics import DeadLatents, FiringCounts
from .optimizer import Optimizer, learning_rate
from .origin import save_origin
from .placement import ON_DEVICE, Offload, Placement, away_names, move, zeros_on_disk, zeros_on_host
from .plan import annealed, plan
from .reader import Batch
from .report_page import write_page
from .run_folder import begin_run
from .run_log import RunLog
from .run_report import Place, decoder_norms, report_run
from .source import Source
from .step import StepResult, train_step
from .transcoder import CrossLayerTranscoder, Zeros, new_transcoder, pageable_zeros


class Reading(NamedTuple):
    """What it took to read the batches of a step."""

    seconds: float
    waited: float
    """Of them, for the cache to be decoded"""


class Run:
    """Begun by `begin`; within its context it logs."""

    def __init__(
        self, config: TrainConfig, source: Source, model: CrossLayerTranscoder, exchange: Exchange = ALONE
    ) -> None:
        self.config, self.source, self.model, self.exchange = config, source, model, exchange
        self.plan = plan(config, source, model.shape.n_latents)
        clip, compiled = config.max_grad_norm, config.compile
        self.optimizer = Optimizer(model, config.optimizer, config.seed, clip, compiled)
        self.placement: Placement = ON_DEVICE
        if config.offload != "none":
            self.placement = Offload(model, self.optimizer, zeros_for(config))
        self.dead = DeadLatents(model, self.plan.dead_after)
        self.firing = FiringCounts(model, self.plan.dead_after)
        self.step = self.tokens = 0
        self.lr = self.plan.lr
        self.fvu: float | None = None
        """Mean over layers, of the last step; None before the first one of this process."""
        self.log: RunLog
        """Opened once it is clear which lines of a resumed run stay"""

    @property
    def device(self) -> torch.device:
        return self.model.inputs.mean.device

    def begin(self, resume: bool) -> dict[str, Any] | None:
        """Make the folder, or go on from its latest checkpoint: then, where the reader stood."""
        state = None
        if self.exchange.first:
            resume = begin_run(self.config, resume)
            save_origin(self.config.run, self.source.manifest.source, self.source.manifest.seed)
        if self.exchange.agree(resume):
            state = self._restore()
        self.model.outputs.measure(self.source.statistics("mlp_out").variance)
        return state

    def _restore(self) -> dict[str, Any]:
        state = restore_training(checkpoint_folder(self.config.run), self.model, self.optimizer)
        self.step, self.tokens, self.dead.since = state.step, state.tokens, state.tokens_since_fired
        self.firing.restore(state.firing)
        if self.exchange.first:
            tidy(self.config.run, self.config.keep)
        return state.reader

    def __enter__(self) -> "Run":
        self.log = RunLog(self.config, self.source, self.model, self.step, self.exchange)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.log.close(failed=kind is not None)

    def take_step(self, batches: list[Batch], reading: Reading) -> None:
        """One optimiser step; a line of metrics.jsonl where one is due.

        Raises DivergedError where loss or gradients are not finite.
        """
        config, plan, began = self.config, self.plan, time.monotonic()
        self.lr = learning_rate(self.step, plan.lr, plan.warmup, plan.steps, config.lr_schedule)
        self.optimizer.begin(self.step, self.lr)
        with self._stops_where_not_finite():
            result = train_step(
                self.model,
                batches,
                self.optimizer.apply,
                config.fvu_variance,
                self.extras(),
                self.placement,
                self.exchange,
            )
            require_finite_loss(result.fvu, self.source.layers)
        tokens = sum(len(batch.all_tokens) for batch in batches)
        self.step, self.tokens = self.step + 1, self.tokens + tokens
        fired = self.exchange.total(result.fired.int())
        self.dead.update(fired, tokens)
        self.firing.update(fired, tokens)
        norm = self._sum_up(result)
        seconds = reading.seconds + time.monotonic() - began
        self.log.add(result, batches, grad_norm=norm, seconds=seconds, waited=reading.waited)
        if self.step % config.log_every == 0:
            self.write_line()

    def _sum_up(self, result: StepResult) -> float:
        """Set `fvu`; the norm of the gradients of all layers."""
        mine = torch.tensor([float(result.fvu.sum()), self.optimizer.grad_norm**2], dtype=torch.float64)
        fvu, square = self.exchange.total(mine).tolist()
        self.fvu = fvu / self.model.shape.n_layers
        return float((square / self.exchange.replicas) ** 0.5)

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

    def save(self, reader: dict[str, Any], held_out_fvu: float | None = None) -> None:
        """A checkpoint, and a line of metrics.jsonl before it, so that no line is about both sides of it.

        reader: its state, from which the run goes on; held_out_fvu: for `--save-best`.
        """
        with self._stops_where_not_finite():
            require_finite_weights(self.model)
        self.write_line()
        firing = self.firing.state()
        state = TrainerState(self.step, self.tokens, reader, self.dead.since, firing, held_out_fvu)
        save_checkpoint(self.config.run, self.model, self.optimizer, state, self.config.keep, self.exchange)
        self.write_report("Held-out numbers are measured when the run is complete.")

    def write_report(self, held_out: Evaluation | str) -> None:
        """report.html as of now; held_out: or why there is no evaluation."""
        place = Place(self.step, self.plan.steps, self.tokens)
        norms = decoder_norms(self.model, self.exchange)
        if self.exchange.first:
            curves = self.log.curves
            report = report_run(
                self.config, self.source, self.model.shape, place, curves, norms, self.firing, held_out
            )
            write_page(self.config.run / "report.html", report)

    @contextmanager
    def _stops_where_not_finite(self) -> Iterator[None]:
        """Within, NaN or infinity ends the run with words on what is left of it."""
        try:
            yield
        except NotFiniteError as fault:
            latest = self.config.run / LATEST
            kept = (
                f"{latest.read_text()} is its last checkpoint"
                if latest.exists()
                else "there is no checkpoint"
            )
            raise DivergedError(
                f"step {self.step + 1}: {fault}. The run is stopped, {kept}; lower --lr, set "
                "--max-grad-norm, or look at that layer with `clt info`"
            ) from fault


def new_run(config: TrainConfig, source: Source, resume: bool, exchange: Exchange = ALONE) -> Run:
    """A run with fresh weights, or those that it is to start from; writes nothing."""
    device = find_device(config.device)
    dtype = getattr(torch, config.dtype)
    if device.type == "cuda" and dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")  # TF32 has all bits of bfloat16 weights
    model = new_transcoder(config.transcoder, source, dtype, config.seed, zeros_for(config))
    move(model, device, leave=away_names(model) if config.offload != "none" else [])
    if config.finetune and not (resume and (config.run / LATEST).exists()):
        for note in start_from(model, config.finetune):
            say(note)
    return Run(config, source, model, exchange)


def zeros_for(config: TrainConfig) -> Zeros:
    """Where decoders and their state live, unless they are moved."""
    if config.offload == "disk":
        return zeros_on_disk(config.run.parent)
    return zeros_on_host if config.offload == "host" else pageable_zeros


def sizes_of_step(config: TrainConfig, tokens_left: int) -> Sequence[int]:
    """Tokens of each micro-batch of a step; the run's last step may be shorter."""
    left = min(config.step_tokens, tokens_left)
    whole, rest = divmod(left, config.batch_tokens)
    return [config.batch_tokens] * whole + [rest] * (rest > 0)


def say(text: str) -> None:
    """To the user, beside the result; of many processes one does."""
    if speaks():
        print(text, file=sys.stderr, flush=True)
