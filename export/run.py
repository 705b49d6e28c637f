"""`clt export`: a run to another package's format, or the reason why that cannot hold it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..cache_format.files import sync_folders
from ..train.checkpoint import checkpoint_folder
from ..train.origin import Origin, load_origin
from ..train.shape import Shape
from .circuit_tracer import write_circuit_tracer
from .clt_training import write_clt_training
from .folding import FoldedTranscoder
from .sae_lens import write_sae_lens
from .sparsify import write_sparsify

CALIBRATE = "make thresholds of it with `clt calibrate`"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Format(NamedTuple):
    """What a format holds, and what writes it."""

    write: Callable[[FoldedTranscoder, Origin, Path, torch.dtype], None]
    activations: tuple[str, ...]
    skip: bool
    """Whether it holds a skip connection beside cross-layer decoders"""
    per_layer_only: bool = False
    all_layers: bool = False
    """Whether layers are counted from 0"""


THRESHOLDS = ("relu", "jumprelu", "batchtopk")
FORMATS = {
    "circuit-tracer": Format(write_circuit_tracer, THRESHOLDS, skip=False, all_layers=True),
    "sae-lens": Format(write_sae_lens, THRESHOLDS, skip=True),
    "sparsify": Format(write_sparsify, ("topk", "groupmax", "relu"), skip=True, per_layer_only=True),
    "clt-training": Format(write_clt_training, ("topk", *THRESHOLDS), skip=False),
}


def export_run(run: Path, out: Path, format_name: str, dtype: str = "float32") -> Origin:
    """Write `out`, whole or not at all. ValueError where the format cannot hold the run."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    if format_name not in FORMATS:
        raise ValueError(f"--format: expected one of {', '.join(FORMATS)}, found {format_name!r}")
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder, or remove it")
    folded = FoldedTranscoder(run)
    origin = load_origin(checkpoint_folder(run).parent)
    require_holds(format_name, folded.shape, origin)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        FORMATS[format_name].write(folded, origin, partial, DTYPES[dtype])
        about_model = {"model": origin.model, "mlps": origin.mlps, "input_site": origin.input_site}
        about = {"format": format_name, "dtype": dtype, "checkpoint": folded.folder.name, **about_model}
        (partial / "clt_export.json").write_text(json.dumps(about, indent=1) + "\n")
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folders([out, out.absolute().parent])
    return origin


def require_holds(format_name: str, shape: Shape, origin: Origin) -> None:
    """ValueError, with the way out, where the format cannot hold the transcoder."""
    target, cross = FORMATS[format_name], shape.n_targets > 1
    if shape.activation not in target.activations:
        way_out = CALIBRATE if "jumprelu" in target.activations else "export it to circuit-tracer or sae-lens"
        raise ValueError(f"{format_name} has no {shape.activation}: {way_out}")
    if target.per_layer_only and cross:
        raise ValueError(
            f"{format_name} holds per-layer transcoders, this one writes to {shape.n_targets} layers; export "
            "it to circuit-tracer or clt-training, or train with --n-targets 1"
        )
    if shape.skip and cross and not target.skip:
        raise ValueError(
            f"{format_name} has no skip connection in cross-layer transcoders; train without "
            "--skip-connection"
        )
    if shape.skip and format_name == "clt-training":
        raise ValueError("clt-training is written without skip connections; export it to sae-lens")
    if target.all_layers and shape.layers != tuple(range(shape.n_layers)):
        raise ValueError(
            f"{format_name} counts layers from 0, this transcoder has {list(shape.layers)}; train it on "
            "layers 0 to the last"
        )
    if format_name not in ("circuit-tracer", "sae-lens") and origin.input_site != "mlp_in":
        raise ValueError(f"{format_name} reads the MLP's input, this transcoder {origin.input_site}")
