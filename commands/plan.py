"""`clt plan`."""

from pathlib import Path
from typing import Annotated

import typer

from ..train.config import TranscoderConfig
from .answers import AsJson, answer, names
from .train import parse_k


def plan_command(
    model: Annotated[str, typer.Argument(help="folder with a config.json (no weights), or hub id")],
    tokens: Annotated[int | None, typer.Option(help="of split train")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="take bits a value, window and sample lengths from this cache")
    ] = None,
    tokens_per_s: Annotated[float | None, typer.Option(help="speed of the harvest")] = None,
    layers: Annotated[str | None, typer.Option(help="to train: 0-31, 0,4,8 or 0-31:4 [default: all]")] = None,
    precision: Annotated[str, typer.Option(help="of the cache to train from: int8 or bf16")] = "int8",
    step_divisor: Annotated[float, typer.Option(help="int8 step = rms / this")] = 8.0,
    window: Annotated[int, typer.Option(help="tokens shuffled and committed together")] = 16384,
    sample_tokens: Annotated[float, typer.Option(help="tokens of a sample")] = 1024.0,
    activation: Annotated[str, typer.Option(help="topk, batchtopk, groupmax, jumprelu or relu")] = "topk",
    k: Annotated[str | None, typer.Option(help="a number, or one a layer [default: 32]")] = None,
    l0: Annotated[
        int | None,
        typer.Option(
            help="latents to plan for of relu and jumprelu, there with those just below [default: all]"
        ),
    ] = None,
    expansion_factor: Annotated[int, typer.Option(help="latents of a layer / d_model")] = 2,
    latents: Annotated[int | None, typer.Option(help="instead of --expansion-factor")] = None,
    n_targets: Annotated[int, typer.Option(help="layers a source writes to, its own included")] = 16,
    tie: Annotated[str, typer.Option(help="decoders: none, one a source, or one a target")] = "none",
    skip_connection: Annotated[bool, typer.Option("--skip-connection", help="linear maps beside")] = False,
    batch_tokens: Annotated[int, typer.Option(help="tokens of a micro-batch")] = 4096,
    grad_acc_steps: Annotated[int, typer.Option(help="micro-batches of a step")] = 1,
    epochs: Annotated[float, typer.Option(help="passes over the cache")] = 1.0,
    optimizer: Annotated[str | None, typer.Option(help="adam, adam8, signum or muon [default: each]")] = None,
    dtype: Annotated[str, typer.Option(help="of the weights: float32, bfloat16")] = "float32",
    buffer_tokens: Annotated[int, typer.Option(help="tokens decoded and shuffled together")] = 8192,
    shuffle_windows: Annotated[
        int | None, typer.Option(help="windows mixed with each other [default: all]")
    ] = None,
    threads: Annotated[int, typer.Option(help="decoding threads")] = 16,
    ranks: Annotated[int, typer.Option(help="processes of torchrun")] = 1,
    read_speeds: Annotated[str, typer.Option(help="of the cache's disk or network, in GB/s")] = "0.2,1,5",
    explain: Annotated[bool, typer.Option("--explain", help="the formula of each line")] = False,
    as_json: AsJson = False,
) -> None:
    """What harvest and training will take, before either: bytes, memory, time. Reads no weights."""
    transcoder = TranscoderConfig(
        activation=activation,
        k=parse_k(k),
        expansion_factor=expansion_factor,
        latents=latents,
        n_targets=n_targets,
        tie=tie,
        skip_connection=skip_connection,
    )
    given = locals()
    same = (
        *("tokens", "tokens_per_s", "precision", "step_divisor", "window", "sample_tokens", "batch_tokens"),
        *("grad_acc_steps", "epochs", "l0", "optimizer", "dtype", "buffer_tokens", "threads"),
        *("shuffle_windows", "ranks"),
    )
    settings = {name: given[name] for name in same} | {"read_speeds": _speeds(read_speeds)}
    from ..planning.line import render, to_json
    from ..planning.plan_config import plan_of
    from ..planning.prediction import predict

    lines = predict(plan_of(model, cache, layers, transcoder, settings))
    answer(as_json, to_json(lines, explain), render(lines, explain))


def _speeds(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in names(text))
    except ValueError:
        raise ValueError(f"--read-speeds: expected GB/s, as in 0.2,1,5, found {text!r}") from None
