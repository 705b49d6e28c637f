"""What a run says before its first step, as text for a terminal."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..remote.address import name_of
from .config import TrainConfig, lr_rule
from .cpu_codes import ADVICE, COMPILED
from .order import perfect_partners, predicted_partners
from .plan import Plan
from .ranks import Mesh, imbalance
from .run import Run
from .shape import Shape
from .source import Source
from .transcoder import CrossLayerTranscoder

SINK_WARNING = 0.5
"""Warn when sinks hold more than this share of a layer's variance."""


def announce(
    config: TrainConfig,
    source: Source,
    model: CrossLayerTranscoder,
    plan: Plan,
    done: int,
    mesh: Mesh | None = None,
) -> str:
    """One line each on cache, transcoder, plan, learning rate, shuffling and folder; done: steps.

    mesh: of a run of many ranks, which has a line too. One more where a CPU would be faster with a compiler.
    """
    rows = {
        "cache": _cache(config, source),
        "clt": _transcoder(config, model),
        "steps": _steps(config, source, plan),
        "lr": _learning_rate(config, plan),
        "shuffle": _shuffle(config, source),
        "run": f"{config.run}{_goes_on(done)}",
    }
    if mesh is not None:
        rows["ranks"] = _ranks(model.shape, mesh)
    if not COMPILED and model.inputs.mean.device.type == "cpu":
        rows["warning"] = ADVICE
    return "\n".join(f"{name:<8} {text}" for name, text in rows.items())


def announce_sweep(runs: Sequence[Run], source: Source, folder: Path) -> str:
    """What is the same for all runs as `announce` has it, then three lines a run."""
    config = runs[0].config
    values = sum(run.model.shape.n_parameters for run in runs) / 1e6
    rows = {
        "cache": _cache(config, source),
        "steps": _steps(config, source, runs[0].plan),
        "shuffle": _shuffle(config, source),
        "sweep": f"{folder}: {len(runs)} runs, {values:.1f} M parameters in all, one read of the cache",
    }
    lines = [f"{name:<8} {text}" for name, text in rows.items()]
    for number, run in enumerate(runs, start=1):
        lines += [
            f"{f'run {number}':<8} {run.config.run.name}{_goes_on(run.step)}",
            f"{'':<8} {_transcoder(run.config, run.model)}",
            f"{'':<8} lr {_learning_rate(run.config, run.plan)}",
        ]
    return "\n".join(lines)


def _steps(config: TrainConfig, source: Source, plan: Plan) -> str:
    epochs = plan.tokens / source.n_tokens
    return f"{plan.steps} of {config.step_tokens} tokens; {plan.tokens} tokens, {epochs:.2f} epochs"


def _goes_on(done: int) -> str:
    return f", goes on after step {done}" if done else ""


def _ranks(shape: Shape, mesh: Mesh) -> str:
    owned = [[str(shape.layers[place]) for place in mesh.owned(shard)] for shard in range(mesh.shards)]
    layers = " | ".join(" ".join(layers) for layers in owned)
    return (
        f"{mesh.world} = {mesh.shards} shards x {mesh.replicas} replicas; layers by shard: {layers}; the "
        f"heaviest has {imbalance(shape, mesh):.2f} times the parameters of a mean one"
    )


def sink_warning(source: Source) -> str | None:
    """Which layers' variance is that of sinks; None where there is no such layer."""
    shares = source.sink_shares()
    if not (found := np.flatnonzero(shares > SINK_WARNING)).size:
        return None
    layers = ", ".join(f"{source.layers[place]} ({shares[place]:.0%})" for place in found.tolist())
    return (
        f"warning: sinks, the tokens of massive norm, hold most of the variance of layer {layers}; FVU "
        "hardly sees the other tokens there. --exclude bos,sink leaves them out"
    )


def _cache(config: TrainConfig, source: Source) -> str:
    names = ", ".join(name_of(path) for path in config.caches)
    which = ", ".join(source.selection.kept_kinds) + ("; no sinks" if source.selection.sinks is False else "")
    return f"{names}: {source.n_tokens} of {len(source.kind)} tokens of split train count ({which})"


def _transcoder(config: TrainConfig, model: CrossLayerTranscoder) -> str:
    shape, k = model.shape, config.transcoder.k
    return (
        f"{shape.n_layers} layers of {shape.n_latents} latents, {config.transcoder.activation}"
        f"{'' if k is None else f', k {k}'}; {shape.n_decoders} decoders, {shape.n_parameters / 1e6:.1f} M "
        f"parameters, {config.dtype} on {model.inputs.mean.device}"
    )


def _learning_rate(config: TrainConfig, plan: Plan) -> str:
    rule = f" by the rule {lr_rule(config.optimizer)}" if config.lr is None else ""
    then = "constant" if config.lr_schedule == "constant" else f"{config.lr_schedule} to 0"
    return f"{plan.lr:.2e}{rule}; {config.optimizer}, {plan.warmup} steps of warm-up, then {then}"


def _shuffle(config: TrainConfig, source: Source) -> str:
    mixed = source.mixed_windows(config.shuffle_windows)
    m = predicted_partners(
        config.batch_tokens,
        source.tokens_per_sample,
        source.n_tokens,
        source.manifest.window,
        config.buffer_tokens,
        len(source.chosen),
        mixed,
    )
    perfect = perfect_partners(config.batch_tokens, source.tokens_per_sample, source.n_tokens)
    text = f"a token will meet {m:.2f} others of its sample in a batch; {perfect:.2f} if order were perfect"
    return text if mixed is None else f"{text}; {mixed} of {len(source.window_chunks)} windows at a time"
