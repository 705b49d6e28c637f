"""`clt harvest`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..harvest.config import HarvestConfig
from ..remote.address import name_of
from ..stopping import stop_on_signals
from .answers import AsJson, answer, names


def harvest_command(
    model: Annotated[str, typer.Argument(help="hub id or folder of a language or vision-language model")],
    dataset: Annotated[
        str, typer.Argument(help=".jsonl, .json or .parquet file, folder of datasets, or hub name")
    ],
    cache: Annotated[Path, typer.Argument(help="folder, or s3://bucket/folder; run again to go on")],
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
    device_map: Annotated[
        str | None, typer.Option(help="auto: over all devices, and host memory where they do not suffice")
    ] = None,
    load_in: Annotated[str | None, typer.Option(help="8bit or 4bit weights, by bitsandbytes")] = None,
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
    stage_dir: Annotated[
        Path | None, typer.Option(help="for a cache on a store: where windows wait [default: staged]")
    ] = None,
    stage_gb: Annotated[float, typer.Option(help="room for them, in GB")] = 100.0,
    rank: Annotated[int | None, typer.Option(help="this process [default: torchrun's]")] = None,
    world_size: Annotated[
        int | None, typer.Option(help="processes that write one cache [default: torchrun's]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="walk the data and tell what would be stored; no weights")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the model over the dataset once and store what its MLPs read and wrote."""
    settings = {name: value for name, value in locals().items() if name not in ("as_json", "dry_run")}
    settings["exclude"] = names(exclude)
    settings["rank"] = rank if rank is not None else int(os.environ.get("RANK", "0"))
    settings["world_size"] = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    config = HarvestConfig(**settings)
    if dry_run:
        _look(config, as_json)
        return
    from ..harvest.run import harvest

    with stop_on_signals():
        report = harvest(config)
    whose = f"rank {config.rank} of {config.world_size}: " if config.world_size > 1 else ""
    text = ", ".join(f"{n} tokens in {name}" for name, n in report.tokens.items())
    lines = [f"{whose}{name_of(cache)} is complete: {text}; {report.rejected} samples rejected"]
    for name, kinds in report.kinds.items():
        lines.append(f"  {name}: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    if spent := sum(report.seconds.values()):
        shares = (f"{seconds / spent:.0%} {name}" for name, seconds in report.seconds.items())
        lines.append(f"  time: {', '.join(shares)}")
    answer(as_json, report._asdict(), "\n".join(lines))


def _look(config: HarvestConfig, as_json: bool) -> None:
    from ..harvest.dry_run import look, render

    with stop_on_signals():
        found = look(config)
    examples = [
        {**example._asdict(), "stretches": [one._asdict() for one in example.stretches]}
        for example in found.examples
    ]
    answer(as_json, {**found._asdict(), "examples": examples}, render(found, sys.stdout.isatty()))
