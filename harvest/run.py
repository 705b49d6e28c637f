"""`clt harvest`: dataset and model in, cache out; stops cleanly, and goes on where it stopped."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..cache_format import CacheWriter, Manifest
from ..cache_format.layout import SPLITS, parse_layers
from ..cache_format.manifest import Scalar
from ..progress import Progress
from ..stopping import StopRequested
from .batches import POOL_BATCHES, collate, pack
from .config import HarvestConfig
from .model import Hookpoints, LoadedModel, find_hookpoints, load_model
from .rows import BadSample, Rows, open_rows, sample_order
from .samples import is_val, parse_sample, sample_id
from .taps import MlpTaps
from .tokens import PreparedSample, prepare

BAD_FRACTION_AFTER = 100
"""Samples to see before --max-bad-fraction is judged."""
DISK_RESERVE = 1.05
"""Ask for this much more than the codes before entropy coding: token table, statistics, journal."""


class HarvestReport(NamedTuple):
    tokens: dict[str, int]
    """Committed, by split (of this rank)."""
    rejected: int
    complete: bool


@dataclass
class _Harvest:
    """What the loop carries."""

    config: HarvestConfig
    model: LoadedModel
    rows: Rows
    order: np.ndarray[tuple[int], np.dtype[np.int64]]
    writer: CacheWriter
    taps: MlpTaps
    progress: Progress
    pools: dict[str, list[PreparedSample]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    seen: int = 0


def harvest(config: HarvestConfig) -> HarvestReport:
    """Run the model over the dataset and store what its MLPs read and wrote."""
    rows = open_rows(config.dataset, config.split)
    model = load_model(config)
    hookpoints = find_hookpoints(model, config.mlp, config.input_site)
    layers = parse_layers(config.layers, tuple(range(model.n_layers)))
    manifest = describe(config, model, rows, hookpoints, layers)
    wanted = config.tokens and _share(config.tokens, config.rank, config.world_size)
    threads = min(8, max(1, torch.get_num_threads()))
    order = sample_order(len(rows), config.shuffle_seed, config.rank, config.world_size)
    with (
        CacheWriter(config.cache, manifest, rank=config.rank, threads=threads, max_tokens=wanted) as writer,
        _tap(model, hookpoints, layers) as taps,
        Progress("harvest", total=wanted, unit="tok", done=writer.committed("train")) as progress,
    ):
        if not writer.complete:
            _check_disk(config.cache, manifest, wanted)
            run = _Harvest(config, model, rows, order[: config.max_samples], writer, taps, progress)
            _run(run)
        return HarvestReport({s: writer.committed(s) for s in SPLITS}, writer.n_rejected, writer.complete)


def describe(
    config: HarvestConfig, model: LoadedModel, rows: Rows, hookpoints: Hookpoints, layers: tuple[int, ...]
) -> Manifest:
    """The manifest: everything that decides the cache's content."""
    template = getattr(model.processor, "chat_template", None) or model.tokenizer.chat_template
    source: dict[str, Scalar] = {
        "model": config.model,
        "model_type": model.config.model_type,
        "revision": config.revision or getattr(model.config, "_commit_hash", None),
        "weights_hash": model.weights_hash,
        "mlps": hookpoints.mlps[0].replace(".0.", ".{}.", 1),
        "dtype": str(next(model.body.parameters()).dtype).removeprefix("torch."),
        "chat_template_hash": _hash(template or ""),
        "processor_hash": _hash(
            str(getattr(model.processor, "image_processor", "")) + str(len(model.tokenizer))
        ),
        "dataset": config.dataset,
        "dataset_split": config.split,
        "dataset_fingerprint": rows.fingerprint,
        "input_site": config.input_site,
        "tokens": config.tokens,
        "max_samples": config.max_samples,
        "val_fraction": config.val_fraction,
        "ctx_len": config.ctx_len,
        "keep_image_tokens": config.keep_image_tokens,
        "exclude": ",".join(sorted(config.exclude)),
        "text_column": config.text_column,
        "image_root": str(config.image_root) if config.image_root else None,
        "batch_tokens": config.batch_tokens,
        **{f"{package}_version": version(package) for package in ("torch", "transformers")},
    }
    return Manifest(
        d_model=model.d_model,
        layers=layers,
        precision=config.precision,
        step_divisor=config.step_divisor if config.precision == "int8" else 0.0,
        window=config.window,
        seed=config.shuffle_seed,
        world_size=config.world_size,
        source=source,
    )


def _run(run: _Harvest) -> None:
    """Read samples in order; whenever a split's pool is full, run it through the model."""
    writer, config = run.writer, run.config
    limit = POOL_BATCHES * config.batch_tokens
    for place in range(min(writer.cursor(split) for split in SPLITS), len(run.order)):
        if writer.full:
            break
        for split, sample in _read(run, place):
            run.pools[split].append(sample)
            if sum(s.length for s in run.pools[split]) >= limit:
                _run_pool(run, split)
        _check_bad_fraction(run)
    for split in SPLITS:
        if run.pools[split]:
            _run_pool(run, split)
    if writer.committed("train") == 0 and not writer.has_tokens:
        raise ValueError(
            f"{config.dataset}: of {run.seen} samples none could be stored; "
            f"see {config.cache / 'rejected.jsonl'}"
        )
    writer.finish()


def _read(run: _Harvest, place: int) -> Iterator[tuple[str, PreparedSample]]:
    """The sample at `place` of the order with its split, unless it is bad, or committed already."""
    config, row_number = run.config, int(run.order[place])
    number = place * config.world_size + config.rank
    run.seen += 1
    name = f"row-{row_number}"
    try:
        row = run.rows[row_number]
        name = sample_id(row, row_number)
        split = "val" if is_val(name, config.shuffle_seed, config.val_fraction) else "train"
        if place < run.writer.cursor(split):
            return
        sample = parse_sample(row, row_number, config.text_column, config.image_root or run.rows.folder)
        yield split, prepare(sample, number, run.model, config)
    except BadSample as fault:
        if config.on_bad_sample == "fail":
            raise ValueError(f"sample {name!r} (row {row_number}): {fault}") from fault
        run.writer.reject(number, {"sample": number, "row": row_number, "id": name, "reason": str(fault)})


def _run_pool(run: _Harvest, split: str) -> None:
    pool, run.pools[split] = run.pools[split], []
    cursor = pool[0].number // run.config.world_size
    for samples in pack(pool, run.config.batch_tokens, run.config.shuffle_seed):
        StopRequested.check()
        if split == "train" and run.writer.full:
            return
        stored = sum(len(sample.columns["sample"]) for sample in samples)
        if run.writer.skippable(split, cursor, stored):
            continue
        batch = collate(samples)
        inputs = {name: _to_device(value, run.model) for name, value in batch.inputs.items()}
        values = run.taps.run(run.model.body, inputs, batch.keep.to(run.model.device))
        start = 0
        for sample in samples:
            rows = slice(start, start := start + len(sample.columns["sample"]))
            part = {site: value[rows] for site, value in values.items()}
            run.writer.add(split, cursor, sample.line, sample.columns, part)
        _report(run)


def _report(run: _Harvest) -> None:
    writer = run.writer
    values = 2 * writer.manifest.n_layers * writer.manifest.d_model
    committed = writer.committed_here
    bits = f", {8 * writer.bytes_written / (committed * values):.2f} bits/value" if committed else ""
    run.progress.advance_to(writer.added("train"), f"{writer.bytes_written / 1e6:.0f} MB written{bits}")


def _check_bad_fraction(run: _Harvest) -> None:
    bad, allowed = run.writer.n_rejected, run.config.max_bad_fraction
    if run.seen >= BAD_FRACTION_AFTER and bad > allowed * run.seen:
        raise ValueError(
            f"{bad} of {run.seen} samples are bad, more than --max-bad-fraction {allowed}; "
            f"see {run.config.cache / 'rejected.jsonl'}, mend the dataset or raise the fraction"
        )


def _check_disk(cache: Path, manifest: Manifest, tokens: int | None) -> None:
    """Refuse before the first token what the disk cannot hold (one window where the end is not known)."""
    needed = int(DISK_RESERVE * manifest.bytes_per_token * (tokens or manifest.window))
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise ValueError(
            f"{cache}: expected room for up to {needed / 1e6:.0f} MB, found {free / 1e6:.0f} MB free; "
            "free some, choose another disk, or harvest fewer --tokens or --layers"
        )


def _tap(model: LoadedModel, hookpoints: Hookpoints, layers: tuple[int, ...]) -> MlpTaps:
    def chosen(paths: list[str]) -> list[torch.nn.Module]:
        return [model.body.get_submodule(paths[layer]) for layer in layers]

    return MlpTaps(chosen(hookpoints.mlps), chosen(hookpoints.norms) if hookpoints.norms else None)


def _to_device(value: torch.Tensor, model: LoadedModel) -> torch.Tensor:
    """Pictures also take the model's number type."""
    dtype = next(model.body.parameters()).dtype if value.is_floating_point() else None
    return value.to(model.device, dtype)


def _share(tokens: int, rank: int, world_size: int) -> int:
    return tokens // world_size + (rank < tokens % world_size)


def _hash(text: str) -> str:
    import hashlib

    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
