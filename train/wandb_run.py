"""The lines of metrics.jsonl for Weights & Biases, under the same names."""

import importlib.util
import os
import secrets
from pathlib import Path

from .config import TrainConfig

PROJECT = "clt"
"""Unless the environment's WANDB_PROJECT names another."""


def require_wandb() -> None:
    """Raises ValueError where the package is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "--log-to-wandb: expected the package wandb, found none; `pip install '.[wandb]'` in the "
            "checkout brings it. metrics.jsonl holds the same numbers without it"
        )


class WandbRun:
    """One W&B run for each run folder: a resumed run goes on with the id that it began with.

    W&B keeps the first value of a step. That of a step which is trained again after a kill is the same
    number, but for the timings.
    """

    def __init__(self, config: TrainConfig) -> None:
        import wandb  # an extra: only runs that log to it need it

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=config.run.resolve().name,
                id=_run_id(config.run),
                dir=config.run,
                config=config.to_json(),
                resume="allow",
                reinit="create_new",  # a sweep's runs log side by side
            )
        except wandb.Error as fault:
            raise ValueError(
                f"--log-to-wandb: expected W&B to begin a run, found: {fault} Or set WANDB_MODE=offline and "
                f"`wandb sync` later. {config.run} is begun: go on with --resume"
            ) from fault

    def write(self, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl; unlike JSON, W&B knows NaN and infinity."""
        self._run.log(metrics, step=int(metrics["step"]))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _run_id(run: Path) -> str:
    path = run / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text()
