"""A run's folder: begun once, with the settings that a resumed run must agree with."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..cache_format.files import write_file
from .checkpoint import LATEST
from .config import TrainConfig, TranscoderConfig, config_from_json

FREE_TO_CHANGE = (
    "save_every",
    "keep",
    "save_best",
    "log_every",
    "log_to_wandb",
    "threads",
    "io",
    "offload",
    "stage_dir",
    "stage_gb",
    "run",
)
"""Settings that a resumed run may have otherwise: they do not change the weights."""


def begin_run(config: TrainConfig, resume: bool) -> bool:
    """Create the run folder, or check that the one to resume is this run; whether there is a checkpoint."""
    path = config.run / "config.json"
    if resume:
        if not path.exists():
            raise ValueError(f"{config.run} holds no run to resume; leave out --resume to begin one")
        there, now = _parse_settings(path), config.to_json()
        differing = [
            f"{name}: {there.get(name)!r} -> {now[name]!r}"
            for name in now
            if name not in FREE_TO_CHANGE and json.loads(json.dumps(now[name])) != there.get(name)
        ]
        if differing:
            raise ValueError(
                f"{config.run} was trained otherwise; use the same settings or another --run-name. "
                f"Differences (there -> now): {'; '.join(differing)}"
            )
        return (config.run / LATEST).exists()
    if config.run.exists() and any(p for p in config.run.iterdir() if not p.name.endswith(".partial")):
        raise ValueError(f"{config.run} exists; choose another --run-name, or go on with --resume")
    config.run.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(config.to_json(), indent=1) + "\n").encode())
    return False


def load_config(run: Path) -> TrainConfig:
    """The settings of a run."""
    path = run / "config.json"
    if not path.exists():
        raise ValueError(f"{run} is no run: expected a file config.json in it, found none")
    return config_from_json(_parse_settings(path))


def _parse_settings(path: Path) -> dict[str, Any]:
    """config.json as it was written; ValueError where this version would not have written these fields."""
    try:
        data = json.loads(path.read_text())
        structure = data["transcoder"]
        found = {*data} | {f"transcoder.{name}" for name in structure}
    except (ValueError, TypeError, KeyError) as fault:
        raise ValueError(f"{path}: expected the settings of a run, found none: {fault!r}") from None
    expected = {field.name for field in fields(TrainConfig)}
    expected |= {f"transcoder.{field.name}" for field in fields(TranscoderConfig)}
    if found != expected:
        raise ValueError(
            f"{path} is of another version of clt: missing {sorted(expected - found)}, unknown "
            f"{sorted(found - expected)}; use the version that trained it, or train it again"
        )
    settings: dict[str, Any] = data
    return settings
