"""`clt train` and `clt calibrate`: from caches to runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..stopping import stop_on_signals
from ..train.config import KINDS, TrainConfig, config_of
from ..train.sweep_file import read_sweep, sweep_configs
from .answers import AsJson, Threads, answer, names

NO_SETTINGS = ("run_name", "out", "sweep", "resume", "as_json")
"""Options of `clt train` that are not part of a run's config."""


def train_command(
    caches: Annotated[
        list[Path],
        typer.Argument(help="caches of one identity: folders, or s3://bucket/folder"),
    ],
    run_name: Annotated[str, typer.Option(help="writes checkpoints/NAME")],
    out: Annotated[Path | None, typer.Option(help="run folder instead of checkpoints/NAME")] = None,
    activation: Annotated[str, typer.Option(help="topk, batchtopk, groupmax, relu or jumprelu")] = "topk",
    k: Annotated[
        str | None, typer.Option(help="active latents of a token: a number, or one a layer [default: 32]")
    ] = None,
    k_anneal_steps: Annotated[int, typer.Option(help="steps in which k falls from ten times its value")] = 0,
    bandwidth: Annotated[
        float | None, typer.Option(help="of jumprelu's straight-through gradient [default: 2]")
    ] = None,
    sparsity_coeff: Annotated[
        float | None, typer.Option(help="weight of relu's and jumprelu's sparsity loss")
    ] = None,
    auxk_alpha: Annotated[float, typer.Option(help="weight of AuxK; 0.03125 is usual")] = 0.0,
    dead_latent_penalty: Annotated[
        float, typer.Option(help="weight of the loss that revives dead latents")
    ] = 0.0,
    dead_after_tokens: Annotated[
        int | None, typer.Option(help="not active for so long is dead [default: 10 million, or an epoch]")
    ] = None,
    expansion_factor: Annotated[int, typer.Option(help="latents of a layer / d_model")] = 2,
    latents: Annotated[
        int | None, typer.Option(help="latents of a layer, instead of --expansion-factor")
    ] = None,
    n_targets: Annotated[int, typer.Option(help="layers a source writes to, its own included")] = 16,
    tie: Annotated[str, typer.Option(help="decoders: none, one a source, or one a target")] = "none",
    skip_connection: Annotated[
        bool, typer.Option("--skip-connection", help="add a linear map of each target's own input")
    ] = False,
    layers: Annotated[
        str | None, typer.Option(help="0-31, 0,4,8 or 0-31:4 [default: all in the cache]")
    ] = None,
    loss_fn: Annotated[
        str, typer.Option(help="fvu: squared error over variance, summed over targets")
    ] = "fvu",
    fvu_variance: Annotated[
        str, typer.Option(help="the loss is divided by that of the cache, or of the batch")
    ] = "cache",
    batch_tokens: Annotated[int, typer.Option(help="tokens of a micro-batch")] = 4096,
    grad_acc_steps: Annotated[int, typer.Option(help="micro-batches of a step")] = 1,
    epochs: Annotated[float, typer.Option(help="passes over the cache")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="optimiser steps at most")] = None,
    tokens: Annotated[int | None, typer.Option(help="tokens at most")] = None,
    optimizer: Annotated[
        str, typer.Option(help="adam, adam8 (8-bit state), signum, or muon (Adam for vectors)")
    ] = "adam",
    lr: Annotated[
        float | None, typer.Option(help="[default: for adam 2e-4 / sqrt(latents / 16384); printed]")
    ] = None,
    lr_warmup_steps: Annotated[
        int | None, typer.Option(help="[default: 1000, or a tenth of the run]")
    ] = None,
    lr_schedule: Annotated[str, typer.Option(help="linear, cosine or constant")] = "linear",
    max_grad_norm: Annotated[
        float | None, typer.Option(help="clip by the norm of each decoder's, each encoder's gradients")
    ] = None,
    kinds: Annotated[str, typer.Option(help="kinds of tokens that count")] = ",".join(KINDS),
    exclude: Annotated[str | None, typer.Option(help="kinds that do not count, and sink: bos,sink")] = None,
    exclude_token_ids: Annotated[
        str | None, typer.Option(help="ids of the vocabulary that do not count: 0,2")
    ] = None,
    keep_kind: Annotated[
        str | None, typer.Option(help="train on this share of a kind's tokens only: image=0.25")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="of weights: float32, bfloat16 (rounded stochastically) or float64")
    ] = "float32",
    device: Annotated[str | None, typer.Option(help="[default: cuda where there is one]")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="compile adam8's update; needs a C++ compiler, on a GPU Triton")
    ] = False,
    offload: Annotated[
        str, typer.Option(help="none; host, disk: where decoders and their optimiser state wait their turn")
    ] = "none",
    io: Annotated[str, typer.Option(help="mmap, or pread for network file systems")] = "mmap",
    threads: Threads = None,
    buffer_tokens: Annotated[
        int, typer.Option(help="tokens decoded and shuffled together; two such buffers are held in memory")
    ] = 8192,
    shuffle_windows: Annotated[
        int | None,
        typer.Option(help="windows mixed with each other [default: all, or what the stage holds twice]"),
    ] = None,
    stage_dir: Annotated[
        Path | None,
        typer.Option(help="for caches on stores: where shards wait their turn [default: staged, by the run]"),
    ] = None,
    stage_gb: Annotated[float, typer.Option(help="room for them, in GB")] = 100.0,
    seed: Annotated[int, typer.Option(help="of weights and reading order")] = 0,
    order_seed: Annotated[int | None, typer.Option(help="of the reading order [default: --seed]")] = None,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 1000,
    keep: Annotated[int, typer.Option(help="checkpoints that stay")] = 1,
    save_best: Annotated[
        bool,
        typer.Option("--save-best", help="keep the checkpoint of the smallest held-out FVU too: RUN/best"),
    ] = False,
    log_every: Annotated[int, typer.Option(help="steps between lines of metrics.jsonl")] = 1,
    log_to_wandb: Annotated[
        bool, typer.Option("--log-to-wandb", help="the same lines to Weights & Biases; needs the extra wandb")
    ] = False,
    finetune: Annotated[Path | None, typer.Option(help="start from this run's weights")] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="train many configurations from one read: a TOML file, docs/sweeps.md")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's latest checkpoint")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit a cross-layer transcoder from caches; needs neither the model nor its libraries."""
    options = {name: value for name, value in locals().items() if name not in NO_SETTINGS}
    options |= {"caches": tuple(caches), "k": parse_k(k), "kinds": names(kinds), "exclude": names(exclude)}
    options |= {"exclude_token_ids": _ids(exclude_token_ids), "keep_kind": _shares(keep_kind)}
    folder = out or Path("checkpoints") / run_name
    if sweep is None:
        _train(config_of({**options, "run": folder}), resume, as_json)
    else:
        _sweep(options, sweep, folder, resume, as_json)


def _train(config: TrainConfig, resume: bool, as_json: bool) -> None:
    from ..train.job import speaks
    from ..train.loop import train
    from ..train.report import render_training

    with stop_on_signals():
        report = train(config, resume)
    if speaks():
        answer(as_json, {**report._asdict(), "run": str(report.run)}, render_training(report))


def _sweep(options: dict[str, Any], path: Path, folder: Path, resume: bool, as_json: bool) -> None:
    entries = read_sweep(path)
    configs = sweep_configs(options, entries, folder)
    from ..train.sweep import sweep
    from ..train.sweep_report import render_sweep

    with stop_on_signals():
        report = sweep(folder, entries, configs, resume)
    answer(as_json, report.to_json(), render_sweep(report))


def calibrate_command(
    run: Annotated[
        Path, typer.Argument(help="run with topk, groupmax or batchtopk, or one checkpoint in it")
    ],
    out: Annotated[Path, typer.Argument(help="run folder to write, with jumprelu")],
    cache: Annotated[
        list[Path] | None, typer.Option(help="tokens to look at [default: the run's own caches]")
    ] = None,
    tokens: Annotated[int, typer.Option(help="of split train that decide the thresholds")] = 65536,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Turn k into one threshold a layer that keeps as many latents; reports L0 and FVU before and after."""
    from ..train.calibrate import calibrate

    found = calibrate(run, out, caches=tuple(cache or ()), tokens=tokens, threads=threads)
    answer(as_json, {"run": str(out), **found.to_json()}, f"{found}\n{out} is written, with jumprelu")


def parse_k(text: str | None) -> int | tuple[int, ...] | None:
    """`32`, or `16,16,32`: one a layer."""
    try:
        numbers = tuple(int(part) for part in names(text))
    except ValueError:
        raise ValueError(
            f"--k: expected a number, or one for each layer as in 16,16,32, found {text!r}"
        ) from None
    return (numbers[0] if len(numbers) == 1 else numbers) if numbers else None


def _ids(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in names(text))
    except ValueError:
        raise ValueError(f"--exclude-token-ids: expected numbers, as in 0,2, found {text!r}") from None


def _shares(text: str | None) -> tuple[tuple[str, float], ...]:
    """`image=0.25,template=0.5`."""
    try:
        pairs = [part.partition("=") for part in names(text)]
        return tuple((kind, float(share)) for kind, _, share in pairs)
    except ValueError:
        raise ValueError(
            f"--keep-kind: expected kinds with shares, as in image=0.25, found {text!r}"
        ) from None
