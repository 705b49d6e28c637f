"""How many steps and tokens a run has, and what follows from that."""

import math
from typing import NamedTuple

from .config import DEAD_AFTER_TOKENS, DEFAULT_WARMUP_STEPS, TrainConfig, default_lr
from .source import Source

ANNEAL_FROM = 10
"""k begins at this times its value, as in clt-training."""


class Plan(NamedTuple):
    """What follows from config and cache."""

    steps: int
    tokens: int
    lr: float
    warmup: int
    dead_after: int


def plan(config: TrainConfig, source: Source, n_latents: int) -> Plan:
    """Steps and tokens of the run, and what defaults to them."""
    epoch_tokens = math.ceil(config.epochs * source.n_tokens)
    tokens = min(epoch_tokens, config.tokens or epoch_tokens)
    steps = math.ceil(tokens / config.step_tokens)
    if config.steps is not None and config.steps < steps:
        steps, tokens = config.steps, config.steps * config.step_tokens
    warmup = config.lr_warmup_steps
    if warmup is None:
        warmup = min(DEFAULT_WARMUP_STEPS, steps // 10)
    dead_after = config.dead_after_tokens or min(DEAD_AFTER_TOKENS, source.n_tokens)
    return Plan(steps, tokens, config.lr or default_lr(config.optimizer, n_latents), warmup, dead_after)


def annealed(k: int, step: int, anneal_steps: int, n_latents: int) -> int:
    """k of an optimiser step while it falls linearly from ten times k, or all latents, to k."""
    first = min(n_latents, ANNEAL_FROM * k)
    return k if step >= anneal_steps else round(first + (k - first) * step / anneal_steps)
