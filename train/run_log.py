"""What a run says of itself while it trains: metrics.jsonl, the same to W&B, and report.html."""

from .config import TrainConfig
from .curves import Curves
from .exchange import ALONE, Exchange
from .metrics import DeadLatents, KindVariance, MetricsFile, StepAverages
from .reader import Batch
from .source import Source
from .step import StepResult
from .transcoder import CrossLayerTranscoder
from .wandb_run import WandbRun


class RunLog:
    """A line is written every `log_every` steps and at each checkpoint, and covers the steps since the last.

    So no line holds steps of both sides of a checkpoint, and a run that is resumed from it writes the lines
    that it would have written without the interruption.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        model: CrossLayerTranscoder,
        last_step: int,
        exchange: Exchange = ALONE,
    ) -> None:
        self._config, self._layers = config, source.layers
        first = exchange.first
        self._wandb = WandbRun(config) if config.log_to_wandb and first else None
        self._averages = StepAverages(source.layers, KindVariance(source, model), exchange)
        self._file = MetricsFile(config.run / "metrics.jsonl", last_step) if first else None
        self.curves = self._file.curves if self._file is not None else Curves()

    def add(
        self, result: StepResult, batches: list[Batch], *, grad_norm: float, seconds: float, waited: float
    ) -> None:
        """One optimiser step; see `StepAverages`."""
        self._averages.add(result, batches, grad_norm=grad_norm, seconds=seconds, waited=waited)

    def write(self, step: int, tokens: int, lr: float, k: float | None, dead: DeadLatents) -> None:
        """A line, unless there was no step since the last one. lr, k and dead are those of the last step.

        k: mean over layers; None, and not in the line, where the activation has none.
        """
        if self._averages.empty:
            return
        line = {
            "step": step,
            "tokens": tokens,
            **self._averages.take(),
            **{f"dead/{n}": share for n, share in zip(self._layers, dead.share(), strict=True)},
            "lr": lr,
        }
        if k is not None:
            line["k"] = k
        if self._file is not None:
            self._file.write(line)
        if self._wandb is not None:
            self._wandb.write(line)

    def close(self, failed: bool) -> None:
        """The second time it does nothing."""
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.close(failed)
            self._wandb = None
