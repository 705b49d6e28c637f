"""`clt eval`, `clt features`, `clt export` and `clt import`: what becomes of a run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .answers import AsJson, Threads, answer


def eval_command(
    run: Annotated[Path, typer.Argument(help="run folder, or one checkpoint in it")],
    cache: Annotated[
        list[Path] | None, typer.Option(help="held-out tokens [default: the run's own caches]")
    ] = None,
    split: Annotated[str, typer.Option(help="val or train")] = "val",
    threads: Threads = None,
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
    from ..train.checkpoint import checkpoint_folder
    from ..train.report import evaluate_cache

    found, text = evaluate_cache(run, split, tuple(cache or ()), threads)
    if model is None:
        found["not_computed"]["model"] = "no --model and --dataset, so no MLP was replaced"
    else:
        from ..analysis.with_model import evaluate_run

        settings = {"model": model, "dataset": dataset, "image_root": image_root, "mlp": mlp}
        settings |= {"dtype": dtype, "device": device}
        found["model"], more = evaluate_run(
            run, settings, samples, generate, tuple(ablate or ()), tuple(steer or ())
        )
        text += f"\n{more}"
    (checkpoint_folder(run).parent / "eval.json").write_text(json.dumps(found, indent=1) + "\n")
    answer(as_json, found, text)


def features_command(
    run: Annotated[Path, typer.Argument(help="run folder, or one checkpoint in it")],
    cache: Annotated[
        list[Path] | None, typer.Option(help="tokens to look at [default: the run's own caches]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write [default: RUN/features]")] = None,
    split: Annotated[str, typer.Option(help="train or val")] = "train",
    dataset: Annotated[
        str | None, typer.Option(help="where the dataset lies now [default: where it lay]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="folder of the model, for promoted and suppressed tokens")
    ] = None,
    top: Annotated[int, typer.Option(help="top examples of each latent")] = 16,
    quantiles: Annotated[int, typer.Option(help="examples at quantiles of each latent's activations")] = 10,
    batch_tokens: Annotated[int, typer.Option(help="tokens encoded together")] = 4096,
    threads: Threads = None,
    device: Annotated[str | None, typer.Option(help="[default: cuda where there is one]")] = None,
    as_json: AsJson = False,
) -> None:
    """Pages of every latent: examples with text and pictures, frequency, kinds, similar latents, targets.

    One pass over the cache, without the model; stopped, it goes on with the same command. Open
    OUT/index.html in a browser: no server and no network is needed.
    """
    from ..analysis.features import write_features
    from ..analysis.features_config import FeaturesConfig
    from ..analysis.latents import Sizes
    from ..train.checkpoint import checkpoint_folder

    config = FeaturesConfig(
        run=run,
        out=out or checkpoint_folder(run).parent / "features",
        caches=tuple(cache or ()),
        split=split,
        dataset=dataset,
        model=model,
        sizes=Sizes(top=top),
        quantiles=quantiles,
        batch_tokens=batch_tokens,
        threads=threads,
        device=device,
    )
    report = write_features(config)
    answer(as_json, {**report._asdict(), "out": str(report.out)}, report.render())


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
    from ..export.run import export_run

    origin = export_run(run, out, format_name, dtype)
    found = {"out": str(out), "format": format_name, **origin._asdict()}
    answer(as_json, found, f"{out} is written for {format_name}; the model is {origin.model}")


def import_command(
    folder: Annotated[Path, typer.Argument(help="what another package wrote")],
    run: Annotated[Path, typer.Argument(help="run folder to write")],
    format_name: Annotated[str, typer.Option("--format", help="circuit-tracer or clt-training")],
    model: Annotated[str | None, typer.Option(help="hub id or folder of the model it is for")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a run of a transcoder in another package's format, for eval, export and --finetune."""
    from ..export.imported import import_run

    shape = import_run(folder, run, format_name, model)
    found = {"run": str(run), "layers": list(shape.layers), "latents": shape.n_latents}
    answer(as_json, found, f"{run}: {shape.n_layers} layers of {shape.n_latents} latents, {shape.activation}")
