"""The command `clt`: parse, import the stage, call it. Nothing heavy is imported for `--help`."""

import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .harvest.config import HarvestConfig
from .stopping import StopRequested, stop_on_signals
from .train.config import KINDS, TrainConfig, TranscoderConfig

# typer carries click inside; this is its base of all usage errors, which it does not export
UsageError: type[Exception] = typer.BadParameter.__mro__[2]

OK, FAULTY, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    help="Run a vision-language model once, then train cross-layer transcoders from the cache.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@app.callback()
def everywhere(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Options of every command; `--debug` is looked for in `main`."""


@app.command("harvest")
def harvest_command(
    model: Annotated[str, typer.Argument(help="hub id or folder of a language or vision-language model")],
    dataset: Annotated[
        str, typer.Argument(help=".jsonl, .json or .parquet file, folder of datasets, or hub name")
    ],
    cache: Annotated[Path, typer.Argument(help="folder to write; run again to go on where it stopped")],
    tokens: Annotated[
        int | None, typer.Option(help="stop after this many stored tokens of split train")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="0-31, 0,4,8 or 0-31:4 [default: all]")] = None,
    input_site: Annotated[str, typer.Option(help="mlp_in, or resid_mid (before the MLP's norm)")] = "mlp_in",
    precision: Annotated[str, typer.Option(help="int8 (block-scaled) or bf16 (bit-exact)")] = "int8",
    step_divisor: Annotated[float, typer.Option(help="int8 step = rms / this")] = 8.0,
    window: Annotated[int, typer.Option(help="tokens shuffled and committed together")] = 16384,
    val_fraction: Annotated[float, typer.Option(help="share of the samples for split val")] = 0.01,
    ctx_len: Annotated[int, typer.Option(help="tokens a sample; an image is never cut in two")] = 1024,
    keep_image_tokens: Annotated[
        float, typer.Option(help="seeded random fraction of each image's tokens")
    ] = 1.0,
    exclude: Annotated[str | None, typer.Option(help="kinds never stored, such as template,bos")] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="where image paths start [default: the dataset's folder]")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="column of plain text [default: text]")] = None,
    split: Annotated[str, typer.Option(help="split of a hub dataset or folder")] = "train",
    max_samples: Annotated[
        int | None, typer.Option(help="read at most this many samples (of all ranks)")
    ] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="image paths may leave --image-root")
    ] = False,
    fetch_urls: Annotated[
        bool, typer.Option("--fetch-urls", help="fetch images that are http or https addresses")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="threads that prepare samples [default: half the cores, at most 8]")
    ] = None,
    shuffle_seed: Annotated[int, typer.Option(help="seeds sample order, split and windows")] = 0,
    batch_tokens: Annotated[int, typer.Option(help="tokens in one forward pass")] = 8192,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str | None, typer.Option(help="[default: cuda where there is one]")] = None,
    revision: Annotated[str | None, typer.Option(help="of a hub model")] = None,
    attn: Annotated[str | None, typer.Option(help="attention implementation")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run code that comes with the model")
    ] = False,
    mlp: Annotated[
        str | None, typer.Option(help="such as model.language_model.layers.{}.mlp [default: found]")
    ] = None,
    on_bad_sample: Annotated[str, typer.Option(help="skip (list it in rejected.jsonl) or fail")] = "skip",
    max_bad_fraction: Annotated[
        float, typer.Option(help="stop when more samples than this share are bad")
    ] = 0.05,
    rank: Annotated[int | None, typer.Option(help="this process [default: torchrun's]")] = None,
    world_size: Annotated[
        int | None, typer.Option(help="processes that write one cache [default: torchrun's]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run the model over the dataset once and store what its MLPs read and wrote."""
    settings = {name: value for name, value in locals().items() if name != "as_json"}
    settings["exclude"] = _names(exclude)
    settings["rank"] = rank if rank is not None else int(os.environ.get("RANK", "0"))
    settings["world_size"] = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    config = HarvestConfig(**settings)
    from .harvest.run import harvest

    with stop_on_signals():
        report = harvest(config)
    whose = f"rank {config.rank} of {config.world_size}: " if config.world_size > 1 else ""
    text = ", ".join(f"{n} tokens in {name}" for name, n in report.tokens.items())
    lines = [f"{whose}{cache} is complete: {text}; {report.rejected} samples rejected"]
    for name, kinds in report.kinds.items():
        lines.append(f"  {name}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    _answer(as_json, report._asdict(), "\n".join(lines))


@app.command()
def info(
    cache: Annotated[Path, typer.Argument(help="folder of a cache")],
    token: Annotated[
        int | None, typer.Option(help="where this token comes from, counted in the order on disk")
    ] = None,
    split: Annotated[str, typer.Option(help="with --token: train or val")] = "train",
    dataset: Annotated[
        str | None, typer.Option(help="with --token: where the dataset lies now [default: where it lay]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a cache holds: tokens by split and kind, bytes, bits a value, noise by layer."""
    from .cache_format import open_cache
    from .cache_format.summary import render_summary, summarise_cache
    from .progress import Progress

    opened = open_cache(cache, check=False)
    if token is not None:
        from .cache_format.provenance import trace_token
        from .harvest.provenance import read_source, render_token

        trace = trace_token(opened, split, token)
        found = read_source(trace, opened.manifest.source, dataset)
        _answer(as_json, {**trace, "source": found._asdict()}, render_token(trace, found))
        return
    with Progress("look at files", total=opened.n_files, unit="files", leave=False) as progress:
        opened.check_files(progress.add)
    summary = summarise_cache(opened)
    _answer(as_json, summary, render_summary(summary, str(cache)))


@app.command()
def verify(
    cache: Annotated[Path, typer.Argument(help="folder of a cache")],
    full: Annotated[bool, typer.Option("--full", help="check and decode every byte")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a cache: existence, sizes and indexes of all files; --full: every checksum. Exit 1 on a fault."""
    from .cache_format import open_cache, verify_cache
    from .progress import Progress

    opened = open_cache(cache, check=False)  # a folder that is no cache is a wrong argument, not a fault
    with Progress("verify", total=opened.n_files, unit="files") as progress:
        faults = verify_cache(opened, full, progress.add)
    text = (
        "\n".join(faults)
        if faults
        else f"{cache}: no fault found{'' if full else ' (sizes and indexes; --full reads all)'}"
    )
    _answer(as_json, {"faults": faults, "full": full}, text)
    if faults:
        raise typer.Exit(FAULTY)


@app.command("train")
def train_command(
    caches: Annotated[list[Path], typer.Argument(help="one or more caches of one identity")],
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
    io: Annotated[str, typer.Option(help="mmap, or pread for network file systems")] = "mmap",
    threads: Annotated[int | None, typer.Option(help="decoding threads [default: one a core]")] = None,
    buffer_tokens: Annotated[
        int, typer.Option(help="tokens decoded and shuffled together; two such buffers are held in memory")
    ] = 8192,
    seed: Annotated[int, typer.Option(help="of reading order and weights")] = 0,
    save_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 1000,
    keep: Annotated[int, typer.Option(help="checkpoints that stay")] = 1,
    log_every: Annotated[int, typer.Option(help="steps between lines of metrics.jsonl")] = 1,
    log_to_wandb: Annotated[
        bool, typer.Option("--log-to-wandb", help="the same lines to Weights & Biases; needs the extra wandb")
    ] = False,
    finetune: Annotated[Path | None, typer.Option(help="start from this run's weights")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's latest checkpoint")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit a cross-layer transcoder from caches; needs neither the model nor its libraries."""
    structure = (
        "activation",
        "k",
        "bandwidth",
        "expansion_factor",
        "latents",
        "n_targets",
        "tie",
        "skip_connection",
    )
    given = {**locals(), "k": _k(k)}
    rest = set(given) - {*structure, "structure", "run_name", "out", "resume", "as_json"}
    settings: dict[str, Any] = {name: given[name] for name in rest}
    settings |= {"caches": tuple(caches), "kinds": _names(kinds), "exclude": _names(exclude)}
    settings |= {"exclude_token_ids": _ids(exclude_token_ids), "keep_kind": _shares(keep_kind)}
    transcoder = TranscoderConfig(**{name: given[name] for name in structure})
    config = TrainConfig(run=out or Path("checkpoints") / run_name, transcoder=transcoder, **settings)
    from .train.loop import train
    from .train.report import render_training

    with stop_on_signals():
        report = train(config, resume)
    _answer(as_json, {**report._asdict(), "run": str(report.run)}, render_training(report))


@app.command("eval")
def eval_command(
    run: Annotated[Path, typer.Argument(help="run folder, or one checkpoint in it")],
    cache: Annotated[
        list[Path] | None, typer.Option(help="held-out tokens [default: the run's own caches]")
    ] = None,
    split: Annotated[str, typer.Option(help="val or train")] = "val",
    threads: Annotated[int | None, typer.Option(help="decoding threads [default: one a core]")] = None,
    model: Annotated[str | None, typer.Option(help="replace this model's MLPs, too")] = None,
    dataset: Annotated[str | None, typer.Option(help="its held-out samples go through the model")] = None,
    samples: Annotated[int, typer.Option(help="held-out samples at most")] = 64,
    generate: Annotated[int, typer.Option(help="samples whose answers are generated, too")] = 0,
    ablate: Annotated[list[str] | None, typer.Option(help="layer:latent to hold at 0; repeat it")] = None,
    steer: Annotated[list[str] | None, typer.Option(help="layer:latent=value to hold; repeat it")] = None,
    image_root: Annotated[Path | None, typer.Option(help="where image paths start")] = None,
    mlp: Annotated[str | None, typer.Option(help="MLPs of the model [default: found]")] = None,
    dtype: Annotated[str, typer.Option(help="of the model: auto, float32, bfloat16")] = "auto",
    device: Annotated[str | None, typer.Option(help="[default: cuda where there is one]")] = None,
    as_json: AsJson = False,
) -> None:
    """Held-out FVU, L0, dead share from a cache; with --model and --dataset, what replacing its MLPs costs.

    Everything is also written to eval.json in the run folder.
    """
    if (model is None) != (dataset is None):
        raise ValueError("expected --model and --dataset together, found one of them")
    if model is None and (ablate or steer or generate):
        raise ValueError("--ablate, --steer and --generate need --model and --dataset")
    from .train.checkpoint import checkpoint_folder
    from .train.report import evaluate_cache

    found, text = evaluate_cache(run, split, tuple(cache or ()), threads)
    if model is not None:
        from .analysis.with_model import evaluate_run

        settings = {"model": model, "dataset": dataset, "image_root": image_root, "mlp": mlp}
        settings |= {"dtype": dtype, "device": device}
        found["model"], more = evaluate_run(
            run, settings, samples, generate, tuple(ablate or ()), tuple(steer or ())
        )
        text += f"\n{more}"
    (checkpoint_folder(run).parent / "eval.json").write_text(json.dumps(found, indent=1) + "\n")
    _answer(as_json, found, text)


@app.command("calibrate")
def calibrate_command(
    run: Annotated[
        Path, typer.Argument(help="run with topk, groupmax or batchtopk, or one checkpoint in it")
    ],
    out: Annotated[Path, typer.Argument(help="run folder to write, with jumprelu")],
    cache: Annotated[
        list[Path] | None, typer.Option(help="tokens to look at [default: the run's own caches]")
    ] = None,
    tokens: Annotated[int, typer.Option(help="of split train that decide the thresholds")] = 65536,
    threads: Annotated[int | None, typer.Option(help="decoding threads [default: one a core]")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn k into one threshold a layer that keeps as many latents; reports L0 and FVU before and after."""
    from .train.calibrate import calibrate

    found = calibrate(run, out, caches=tuple(cache or ()), tokens=tokens, threads=threads)
    _answer(as_json, {"run": str(out), **found.to_json()}, f"{found}\n{out} is written, with jumprelu")


@app.command("export")
def export_command(
    run: Annotated[Path, typer.Argument(help="run folder, or one checkpoint in it")],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    format_name: Annotated[
        str, typer.Option("--format", help="circuit-tracer, sae-lens, sparsify or clt-training")
    ],
    dtype: Annotated[str, typer.Option(help="of the weights: float32 or bfloat16")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Write a run for another package, standardisation folded in; refused where the format cannot hold it."""
    from .export.run import export_run

    origin = export_run(run, out, format_name, dtype)
    found = {"out": str(out), "format": format_name, **origin._asdict()}
    _answer(as_json, found, f"{out} is written for {format_name}; the model is {origin.model}")


@app.command("import")
def import_command(
    folder: Annotated[Path, typer.Argument(help="what another package wrote")],
    run: Annotated[Path, typer.Argument(help="run folder to write")],
    format_name: Annotated[str, typer.Option("--format", help="circuit-tracer or clt-training")],
    model: Annotated[str | None, typer.Option(help="hub id or folder of the model it is for")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a run of a transcoder in another package's format, for eval, export and --finetune."""
    from .export.imported import import_run

    shape = import_run(folder, run, format_name, model)
    found = {"run": str(run), "layers": list(shape.layers), "latents": shape.n_latents}
    _answer(
        as_json, found, f"{run}: {shape.n_layers} layers of {shape.n_latents} latents, {shape.activation}"
    )


def _k(text: str | None) -> int | tuple[int, ...] | None:
    """`32`, or `16,16,32`: one a layer."""
    try:
        numbers = tuple(int(part) for part in _names(text))
    except ValueError:
        raise ValueError(
            f"--k: expected a number, or one for each layer as in 16,16,32, found {text!r}"
        ) from None
    return (numbers[0] if len(numbers) == 1 else numbers) if numbers else None


def _ids(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _names(text))
    except ValueError:
        raise ValueError(f"--exclude-token-ids: expected numbers, as in 0,2, found {text!r}") from None


def _shares(text: str | None) -> tuple[tuple[str, float], ...]:
    """`image=0.25,template=0.5`."""
    try:
        pairs = [part.partition("=") for part in _names(text)]
        return tuple((kind, float(share)) for kind, _, share in pairs)
    except ValueError:
        raise ValueError(
            f"--keep-kind: expected kinds with shares, as in image=0.25, found {text!r}"
        ) from None


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


def _answer(as_json: bool, data: dict[str, Any], text: str) -> None:
    print(json.dumps(data) if as_json else text)


def _fail(fault: BaseException, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(fault)
    text = fault.format_message() if hasattr(fault, "format_message") else str(fault)
    print(f"error: {' '.join(text.split()) or type(fault).__name__}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    """Entry point; decides what the user reads and the exit code."""
    _allow_many_files()
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        code = app(args=arguments, prog_name="clt", standalone_mode=False)
    except UsageError as fault:
        _fail(fault, BAD_USAGE, debug)
    except (StopRequested, KeyboardInterrupt, typer.Abort) as fault:
        _fail(
            RuntimeError(
                "interrupted; what was saved is kept, go on with the same command (train: and --resume)"
            )
            if not debug
            else fault,
            INTERRUPTED,
            debug,
        )
    except ValueError as fault:
        from .cache_format.errors import DamagedCacheError

        _fail(fault, FAULTY if isinstance(fault, DamagedCacheError) else BAD_USAGE, debug)
    except OSError as fault:
        _fail(_explain(fault), BAD_USAGE, debug)
    sys.exit(code if isinstance(code, int) else OK)


def _allow_many_files() -> None:
    """A cache of 10 M tokens has 80,000 shards; most systems allow 1,024 open files until they are asked."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _explain(fault: OSError) -> OSError | RuntimeError:
    """A disk that is full, in words."""
    if fault.errno != 28:  # ENOSPC
        return fault
    where = f" ({fault.filename})" if fault.filename else ""
    return RuntimeError(
        f"the disk is full{where}; what was committed is kept, free some space and run again "
        "(train: with --resume)"
    )


if __name__ == "__main__":
    main()
