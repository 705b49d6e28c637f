"""Run folders: config.json, metrics.jsonl, step-XXXXXXXX/ and `latest`.

    step-00001000/
      shape.json                          sizes of the transcoder
      layers.<l>/transcoder.safetensors   W_enc, b_enc; W_dec, b_dec, W_skip; means and scales
      layers.<l>/optimizer.safetensors    the optimiser's state of the same
      trainer.json, trainer.safetensors   step, tokens, place of the reader; when and how often latents fired

A step folder appears whole, by a rename, and `latest` names it after that. No pickle.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..cache_format.files import sync_folders, write_file
from .optimizer import Optimizer
from .shape import Shape
from .transcoder import CrossLayerTranscoder, empty_transcoder

LATEST = "latest"


class TrainerState(NamedTuple):
    step: int
    """Optimiser steps done."""
    tokens: int
    reader: dict[str, Any]
    tokens_since_fired: Tensor
    """(layer, latent) int64"""
    firing: dict[str, Tensor]
    """State of `FiringCounts`"""


def save_checkpoint(
    run: Path, model: CrossLayerTranscoder, optimizer: Optimizer, state: TrainerState, keep: int
) -> Path:
    """Write one step folder; older ones beyond `keep` go once it is in place."""
    target = run / f"step-{state.step:08d}"
    partial = run / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "shape.json").write_text(json.dumps(asdict(model.shape)))
    for place, layer in enumerate(model.shape.layers):
        folder = partial / f"layers.{layer}"
        folder.mkdir()
        save_file(layer_tensors(model, place), folder / "transcoder.safetensors")
        save_file(optimizer.state(place), folder / "optimizer.safetensors")
    latents = {"tokens_since_fired": state.tokens_since_fired, **state.firing}
    save_file(latents, partial / "trainer.safetensors")
    trainer = {"step": state.step, "tokens": state.tokens, "reader": state.reader}
    (partial / "trainer.json").write_text(json.dumps(trainer))
    _sync_tree(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    write_file(run / LATEST, target.name.encode())
    sync_folders([run])
    for old in sorted(run.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def load_transcoder(path: str | Path) -> CrossLayerTranscoder:
    """The transcoder of a run (its latest checkpoint), or of one step folder."""
    folder = checkpoint_folder(Path(path))
    shape = load_shape(folder)
    first = load_file(folder / f"layers.{shape.layers[0]}" / "transcoder.safetensors")
    model = empty_transcoder(shape, first["W_enc"].dtype)
    with torch.no_grad():
        for place, layer in enumerate(shape.layers):
            stored = load_file(folder / f"layers.{layer}" / "transcoder.safetensors")
            for name, tensor in layer_tensors(model, place).items():
                tensor.copy_(stored[name])
    return model


def load_shape(folder: Path) -> Shape:
    """Of a step folder."""
    data = json.loads((folder / "shape.json").read_text())
    k = tuple(data["k"]) if isinstance(data["k"], list) else data["k"]
    return Shape(**{**data, "layers": tuple(data["layers"]), "k": k})


def restore_training(folder: Path, model: CrossLayerTranscoder, optimizer: Optimizer) -> TrainerState:
    """Put weights and the optimiser's state back; where the run stood."""
    with torch.no_grad():
        for place, layer in enumerate(model.shape.layers):
            stored = load_file(folder / f"layers.{layer}" / "transcoder.safetensors")
            for name, tensor in layer_tensors(model, place).items():
                tensor.copy_(stored[name])
            optimizer.restore(place, load_file(folder / f"layers.{layer}" / "optimizer.safetensors"))
    data = json.loads((folder / "trainer.json").read_text())
    firing = load_file(folder / "trainer.safetensors")
    since = firing.pop("tokens_since_fired")
    return TrainerState(data["step"], data["tokens"], data["reader"], since, firing)


def checkpoint_folder(path: Path) -> Path:
    """The step folder that `path` (a run or a step folder) stands for."""
    if (path / "shape.json").exists():
        return path
    if not (path / LATEST).exists():
        raise ValueError(f"{path} holds no checkpoint; expected a run folder with a file `{LATEST}`")
    return path / (path / LATEST).read_text().strip()


def layer_tensors(model: CrossLayerTranscoder, place: int) -> dict[str, Tensor]:
    """Everything that belongs to one layer, by the name it has in the file; shares memory with the model."""
    names = model.names("encoder") + model.names("decoder")
    tensors = {name: getattr(model, name)[place].data for name in names}
    if model.shape.activation == "batchtopk":
        tensors["threshold"] = model.threshold[place]
    for name, site in (("in", model.inputs), ("out", model.outputs)):
        tensors |= {f"{name}_mean": site.mean[place], f"{name}_scale": site.scale[place]}
    return tensors


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync_folders([path])
    sync_folders([folder])
