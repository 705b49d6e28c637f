"""Run folders: config.json, metrics.jsonl, step-XXXXXXXX/ and `latest`.

    step-00001000/
      shape.json                          sizes of the transcoder
      layers.<l>/transcoder.safetensors   W_enc, b_enc; W_dec, b_dec, W_skip; means and scales
      layers.<l>/optimizer.safetensors    the optimiser's state of the same
      trainer.json, trainer.safetensors   step, tokens, place of the reader; when and how often latents fired

A step folder appears whole, by a rename, and `latest` names it after that; it goes by a rename too. What else
a kill may leave has a name that begins with a dot, and the next save removes it. No pickle. `best` names the
checkpoint of the smallest held-out FVU, where that was measured, and that one stays.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..cache_format.files import sync_folders, write_file
from .exchange import ALONE, Exchange
from .optimizer import Optimizer
from .shape import Shape
from .transcoder import CrossLayerTranscoder, empty_transcoder

LATEST, BEST = "latest", "best"


class TrainerState(NamedTuple):
    step: int
    """Optimiser steps done."""
    tokens: int
    reader: dict[str, Any]
    tokens_since_fired: Tensor
    """(layer, latent) int64"""
    firing: dict[str, Tensor]
    """State of `FiringCounts`"""
    held_out_fvu: float | None = None
    """Where it was measured"""


def save_checkpoint(
    run: Path,
    model: CrossLayerTranscoder,
    optimizer: Optimizer,
    state: TrainerState,
    keep: int,
    exchange: Exchange = ALONE,
) -> Path:
    """Write one step folder; older ones beyond `keep` go once it is in place, but for the best one.

    Of many ranks each writes its layers.

    Raises OSError, with all that was saved before as it was, when the disk is full.
    """
    target = run / f"step-{state.step:08d}"
    if exchange.agree((run / LATEST).exists() and checkpoint_folder(run) == target):
        if exchange.first:
            tidy(run, keep)
        return target  # asked to stop right after a save
    partial = run / f".{target.name}.partial"
    try:
        if exchange.first:
            _remove_pieces(run)
            _begin_step(partial, model, state)
        exchange.agree(True)  # the folder is there
        if exchange.replica == 0:
            _write_layers(partial, model, optimizer)
        exchange.agree(True)  # all have written
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if exchange.first:
        sync_folders([partial])
        _publish(run, partial, target, keep)
    exchange.agree(True)  # `latest` names it
    return target


def _publish(run: Path, partial: Path, target: Path, keep: int) -> None:
    if target.exists():  # a kill came before `latest` named it
        _remove(target)
    os.replace(partial, target)
    sync_folders([run])
    write_file(run / LATEST, target.name.encode())
    sync_folders([run])
    tidy(run, keep)


def tidy(run: Path, keep: int) -> None:
    """What a save does once `latest` names its step, and resuming does after a kill: name the best step, and
    remove pieces of steps, steps before the last `keep` but for the best, and those that were never named."""
    _remove_pieces(run)
    target, best, steps = checkpoint_folder(run), name_best(run), sorted(run.glob("step-*"))
    older = [step for step in steps if step < target and step != best]
    for old in [*older[: max(0, len(older) - keep + 1)], *(step for step in steps if step > target)]:
        _remove(old)


def _remove_pieces(run: Path) -> None:
    for left in run.glob(".step-*"):
        shutil.rmtree(left)


def name_best(run: Path) -> Path | None:
    """Let `best` name the step folder of the smallest held-out FVU; None where none was measured.

    All that may be the best lie on the disk, so that a kill before this is made good by the next call.
    """
    latest = checkpoint_folder(run)
    scores = {step: _trainer(step)["held_out_fvu"] for step in sorted(run.glob("step-*")) if step <= latest}
    measured = [step for step, score in scores.items() if score is not None]
    if not measured:
        return None
    best = min(measured, key=lambda step: scores[step])
    write_file(run / BEST, best.name.encode())
    sync_folders([run])
    return best


def _trainer(step: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((step / "trainer.json").read_text())
    return data


def _write_layers(partial: Path, model: CrossLayerTranscoder, optimizer: Optimizer) -> None:
    for place in model.own:
        folder = partial / f"layers.{model.shape.layers[place]}"
        folder.mkdir()
        _write_tensors(folder / "transcoder.safetensors", layer_tensors(model, place))
        _write_tensors(folder / "optimizer.safetensors", optimizer.state(place))
        _sync_tree(folder)


def _begin_step(partial: Path, model: CrossLayerTranscoder, state: TrainerState) -> None:
    """The folder, and what is not of one layer."""
    partial.mkdir(parents=True)
    (partial / "shape.json").write_text(json.dumps(asdict(model.shape)))
    latents = {"tokens_since_fired": state.tokens_since_fired, **state.firing}
    _write_tensors(partial / "trainer.safetensors", latents)
    trainer = {"step": state.step, "tokens": state.tokens, "reader": state.reader}
    trainer["held_out_fvu"] = state.held_out_fvu
    (partial / "trainer.json").write_text(json.dumps(trainer))
    _sync_tree(partial)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as fault:  # it tells the system's error in words only
        number = re.search(r"os error (\d+)", str(fault))
        raise OSError(int(number[1]) if number else errno.EIO, str(fault), str(path)) from fault


def _remove(step: Path) -> None:
    gone = step.with_name(f".{step.name}.removed")
    os.replace(step, gone)
    shutil.rmtree(gone)


def load_transcoder(path: str | Path, own: Sequence[int] | None = None) -> CrossLayerTranscoder:
    """The transcoder of a run (its latest checkpoint), or of one step folder; own: of these places only."""
    folder = checkpoint_folder(Path(path))
    shape = load_shape(folder)
    with safe_open(_file(folder, shape, 0), "pt") as first:
        dtype = first.get_tensor("W_enc").dtype
    model = empty_transcoder(shape, dtype, own)
    _load_weights(folder, model)
    return model


@torch.no_grad()
def _load_weights(folder: Path, model: CrossLayerTranscoder) -> None:
    for place in range(model.shape.n_layers):
        wanted = layer_tensors(model, place)
        with safe_open(_file(folder, model.shape, place), "pt") as stored:
            for name, tensor in wanted.items():
                tensor.copy_(stored.get_tensor(name))


def _file(folder: Path, shape: Shape, place: int) -> Path:
    return folder / f"layers.{shape.layers[place]}" / "transcoder.safetensors"


def load_shape(folder: Path) -> Shape:
    """Of a step folder."""
    data = json.loads((folder / "shape.json").read_text())
    k = tuple(data["k"]) if isinstance(data["k"], list) else data["k"]
    return Shape(**{**data, "layers": tuple(data["layers"]), "k": k})


def restore_training(folder: Path, model: CrossLayerTranscoder, optimizer: Optimizer) -> TrainerState:
    """Put weights and the optimiser's state back; where the run stood."""
    _load_weights(folder, model)
    for place in model.own:
        layer = model.shape.layers[place]
        optimizer.restore(place, load_file(folder / f"layers.{layer}" / "optimizer.safetensors"))
    data = _trainer(folder)
    firing = load_file(folder / "trainer.safetensors")
    since = firing.pop("tokens_since_fired")
    return TrainerState(data["step"], data["tokens"], data["reader"], since, firing, data["held_out_fvu"])


def checkpoint_folder(path: Path) -> Path:
    """The step folder that `path` (a run, its file `latest` or `best`, or a step folder) stands for."""
    if path.name in (LATEST, BEST) and path.is_file():
        return path.parent / path.read_text().strip()
    if (path / "shape.json").exists():
        return path
    if not (path / LATEST).exists():
        raise ValueError(
            f"{path} holds no checkpoint: expected a run folder with a file `{LATEST}`, found none; "
            "name one that `clt train` wrote"
        )
    return checkpoint_folder(path / LATEST)


def layer_tensors(model: CrossLayerTranscoder, place: int) -> dict[str, Tensor]:
    """Everything of one layer that is here, by the name it has in the file; shares memory with the model."""
    names = model.names("encoder") + model.names("decoder") if place in model.own else ()
    if place not in model.own and place in model.decoder_layers:
        names = ("W_dec",)
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
