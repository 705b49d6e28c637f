"""`clt import`: a run from what circuit-tracer or clt-training hold, a layer in memory at a time."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..cache_format.files import write_file
from ..train.checkpoint import LATEST
from ..train.config import TrainConfig, TranscoderConfig
from ..train.origin import save_origin
from ..train.shape import Shape
from .foreign import READERS, Foreign

STEP = "step-00000000"


def import_run(folder: Path, run: Path, format_name: str, model: str | None = None) -> Shape:
    """Write a run folder, whole or not at all, that eval, export and --finetune take."""
    if format_name not in READERS:
        raise ValueError(f"--format: expected one of {', '.join(READERS)}, found {format_name!r}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found none")
    if run.exists():
        raise ValueError(f"{run} exists; choose another folder, or remove it")
    foreign = READERS[format_name](folder)
    partial = run.with_name(f".{run.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(foreign, partial, run, model or foreign.model)
        os.replace(partial, run)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return foreign.shape


def _write(foreign: Foreign, partial: Path, run: Path, model: str) -> None:
    shape, step = foreign.shape, partial / STEP
    for target, layer in enumerate(shape.layers):
        folder = step / f"layers.{layer}"
        folder.mkdir(parents=True)
        decoders = [foreign.decoder(source, target) for source in shape.sources(target)]
        neutral = {"in_mean": torch.zeros(shape.d_model), "in_scale": torch.ones(())}
        neutral |= {"out_mean": torch.zeros(shape.d_model), "out_scale": torch.ones(())}
        tensors = {"W_dec": torch.stack(decoders), "b_dec": foreign.bias(target), **neutral}
        tensors |= foreign.encoder(target)
        if shape.skip:
            tensors["W_skip"] = foreign.skip(target)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "transcoder.safetensors"
        )
    (step / "shape.json").write_text(json.dumps(asdict(shape)))
    structure = TranscoderConfig(
        activation=shape.activation,
        k=shape.k,
        bandwidth=shape.bandwidth,
        latents=shape.n_latents,
        n_targets=shape.n_targets,
        skip_connection=shape.skip,
    )
    config = TrainConfig(
        caches=(), run=run, transcoder=structure, sparsity_coeff=None if shape.layer_k else 0.0
    )
    write_file(partial / "config.json", (json.dumps(config.to_json(), indent=1) + "\n").encode())
    save_origin(partial, {"model": model, "input_site": foreign.input_site}, seed=0)
    write_file(partial / LATEST, STEP.encode())
