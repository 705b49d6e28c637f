"""`clt calibrate`: thresholds instead of k, so that what a token's latents are does not depend on its others.

A run with topk, groupmax or batchtopk becomes one with jumprelu. Each layer gets one threshold: that which
leaves k active latents a token, on average over tokens of split train. The weights stay as they are.
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..cache_format.files import write_file
from ..progress import Progress
from .checkpoint import LATEST, checkpoint_folder, load_transcoder
from .config import DEFAULT_BANDWIDTH, WITH_K, TrainConfig, TranscoderConfig
from .evaluate import Evaluation, evaluate
from .loop import open_source
from .origin import FILE as ORIGIN
from .reader import Reader
from .run_folder import load_config
from .shape import Shape
from .source import Source
from .transcoder import CrossLayerTranscoder

BATCH_TOKENS = 2048
SMALLEST = 1e-6
"""A threshold is at least this; where more are asked for than are positive, all that are positive stay."""


class Calibration(NamedTuple):
    layers: tuple[int, ...]
    thresholds: Tensor
    """(layer,) in the units of pre-activations"""
    before: Evaluation
    """On held-out tokens"""
    after: Evaluation

    def to_json(self) -> dict[str, Any]:
        values = dict(zip(map(str, self.layers), self.thresholds.tolist(), strict=True))
        sides = {"before": self.before.to_json(self.layers), "after": self.after.to_json(self.layers)}
        return {"thresholds": values, **sides}

    def __str__(self) -> str:
        rows = zip(
            self.layers,
            self.thresholds,
            self.before.l0,
            self.after.l0,
            self.before.fvu,
            self.after.fvu,
            strict=True,
        )
        lines = ["layer  threshold        L0 before, after       FVU before, after"]
        lines += [
            f"{n:>5}  {t:>9.4f}  {a:>12.2f} {b:>9.2f}  {c:>12.4f} {d:>9.4f}" for n, t, a, b, c, d in rows
        ]
        lines.append(
            f"all              {self.before.l0.mean():>12.2f} {self.after.l0.mean():>9.2f}  "
            f"{self.before.fvu.mean():>12.4f} {self.after.fvu.mean():>9.4f}   (means over layers, held out)"
        )
        return "\n".join(lines)


def calibrate(
    run: Path, out: Path, *, caches: tuple[Path, ...] = (), tokens: int = 65536, threads: int | None = None
) -> Calibration:
    """Write run folder `out`; ValueError where the run has thresholds of its own, or none to be had."""
    folder = checkpoint_folder(run)
    config, model = load_config(folder.parent), load_transcoder(folder)
    if model.shape.activation not in WITH_K:
        raise ValueError(f"{run}: expected {', '.join(WITH_K)}, found {model.shape.activation}")
    if out.exists():
        raise ValueError(f"{out} exists; choose another folder, or remove it")
    held_out = open_source(config, "val", caches or None)
    before = evaluate(model, held_out, threads=threads)
    train = open_source(config, "train", caches or None)
    thresholds = find_thresholds(model, train, tokens, config, threads)
    _write(folder, out, config, model.shape, thresholds)
    after = evaluate(load_transcoder(out), held_out, threads=threads)
    return Calibration(model.shape.layers, thresholds, before, after)


@torch.no_grad()
def find_thresholds(
    model: CrossLayerTranscoder, source: Source, tokens: int, config: TrainConfig, threads: int | None = None
) -> Tensor:
    """(layer,): halfway between the last pre-activation that stays and the first that goes."""
    tokens = min(tokens, source.n_tokens)
    counts = [k * tokens for k in model.shape.layer_k]
    best = [torch.zeros(0) for _ in counts]
    reading = Reader(source, buffer_tokens=config.buffer_tokens, seed=config.read_seed, threads=threads)
    with reading as reader, Progress("calibrate", total=tokens, unit="tok") as progress:
        for first in range(0, tokens, BATCH_TOKENS):
            batch = reader.next(min(BATCH_TOKENS, tokens - first))
            for layer, count in enumerate(counts):
                mean = model.inputs.mean
                values = batch.values("mlp_in", layer, mean.device, mean.dtype)
                pre = model.pre_activations(model.inputs.apply_to(values, layer), layer)
                floor = best[layer].min() if len(best[layer]) == count + 1 else pre.new_zeros(())
                most = torch.cat([best[layer].to(pre), pre[pre > floor]])
                best[layer] = most.topk(min(count + 1, len(most)), sorted=False).values
            progress.add(len(batch))
    return torch.stack([_between(each, count) for each, count in zip(best, counts, strict=True)])


def _between(best: Tensor, count: int) -> Tensor:
    """Below exactly `count` of the values; best: the count + 1 largest, or all that are positive."""
    if len(best) <= count:
        return best.new_full((), SMALLEST)
    lowest = best.topk(2, largest=False).values
    return lowest.mean().clamp(min=SMALLEST)


def _write(step: Path, out: Path, config: TrainConfig, shape: Shape, thresholds: Tensor) -> None:
    """The run folder, whole or not at all."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for place, layer in enumerate(shape.layers):
            folder = partial / step.name / f"layers.{layer}"
            folder.mkdir(parents=True)
            tensors = load_file(step / f"layers.{layer}" / "transcoder.safetensors")
            tensors.pop("threshold", None)
            theta = thresholds[place].to(tensors["b_enc"]).expand(shape.n_latents)
            tensors["log_threshold"] = theta.log().contiguous()
            save_file(tensors, folder / "transcoder.safetensors")
        jumps: dict[str, Any] = {"activation": "jumprelu", "k": None, "bandwidth": DEFAULT_BANDWIDTH}
        (partial / step.name / "shape.json").write_text(json.dumps({**asdict(shape), **jumps}))
        transcoder = TranscoderConfig(**{**asdict(config.transcoder), **jumps})
        made = replace(config, transcoder=transcoder, run=out, sparsity_coeff=0.0, k_anneal_steps=0)
        write_file(partial / "config.json", (json.dumps(made.to_json(), indent=1) + "\n").encode())
        shutil.copy(step.parent / ORIGIN, partial / ORIGIN)
        write_file(partial / LATEST, step.name.encode())
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
