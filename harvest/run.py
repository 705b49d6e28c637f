"""`clt harvest`: dataset and model in, cache out; stops cleanly, and goes on where it stopped.

Three things happen at once: threads of the feed read and prepare samples, this thread runs the model, and the
outbox's thread hands what came out to the writer, whose own threads quantise, encode and write. Where the
model runs on the processor, it pauses while a window is encoded.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..cache_format import CacheWriter, open_cache
from ..cache_format.compiled import ADVICE, COMPILED
from ..cache_format.layout import SPLITS, parse_layers
from ..heap import keep_freed_memory
from ..progress import Progress
from ..remote.address import remote_address
from ..remote.staging import folder_name
from ..remote.uploading import Upload
from ..stopwatch import Stopwatch
from .columns import describe_columns
from .config import HarvestConfig
from .disk import check_disk
from .feed import Feed, cores
from .forward import Forward
from .identity import describe
from .landing import Landing, choose_form
from .mlps import Hookpoints, find_hookpoints
from .model import LoadedModel, load_model
from .outbox import Outbox
from .pools import Harvest, run_all
from .rows import Rows, open_rows
from .taps import MlpTaps

MOST_WRITERS = 16
"""Threads that quantise and encode; each wants a few megabytes."""


class HarvestReport(NamedTuple):
    tokens: dict[str, int]
    """Committed, by split (of this rank)."""
    kinds: dict[str, dict[str, int]]
    """Tokens by split and kind, and `sink` among them, of the whole cache as it stands."""
    rejected: int
    complete: bool
    seconds: dict[str, float]
    """What this process waited for: samples, device, copy, encode, disk."""


def harvest(config: HarvestConfig) -> HarvestReport:
    """Run the model over the dataset and store what its MLPs read and wrote."""
    rows = open_rows(config.dataset, config.split)
    say_columns(rows, config)
    address = remote_address(config.cache)
    if address is None:
        return harvest_rows(config, rows, load_model(config))
    folder = (config.stage_dir or Path("staged")) / folder_name(address)
    local = replace(config, cache=folder, uploads=True)
    # the store is met before the model is loaded, which takes minutes
    with Upload(address, folder, config.rank, int(config.stage_gb * 1e9)) as upload:
        report = harvest_rows(local, rows, load_model(config), upload.wait_for_room)
        upload.finish()
    return report


def harvest_rows(
    config: HarvestConfig,
    rows: Rows,
    model: LoadedModel,
    after_commit: Callable[[], None] = lambda: None,
) -> HarvestReport:
    """As `harvest`, of what is open and loaded, into a folder."""
    if model.device.type == "cpu":
        keep_freed_memory()  # a forward pass frees and asks for large tensors all the time
    hookpoints = find_hookpoints(model, config.mlp, config.input_site)
    layers = parse_layers(config.layers, tuple(range(model.n_layers)))
    manifest = describe(config, model, rows, hookpoints, layers)
    wanted = config.tokens and _share(config.tokens, config.rank, config.world_size)
    watch = Stopwatch()
    with ExitStack() as stack:
        writer = stack.enter_context(
            CacheWriter(
                config.cache,
                manifest,
                rank=config.rank,
                threads=writer_threads(),
                max_tokens=wanted,
                after_commit=after_commit,
            )
        )
        if not writer.complete:
            say_missing(config.rank)
            check_disk(config, manifest, rows, model)
            done = writer.committed("train")
            progress = stack.enter_context(Progress("harvest", total=wanted, unit="tok", done=done))
            taps = stack.enter_context(_tap(model, hookpoints, layers))
            outbox = stack.enter_context(Outbox(beside=model.device.type != "cpu"))
            landing = Landing(len(layers), choose_form(manifest, model.device), model.device, watch)
            forward = Forward(model, taps, landing, config.batch_tokens, watch)
            feed = Feed(rows, model, config, {split: writer.cursor(split) for split in SPLITS})
            run = Harvest(config, feed, forward, writer, outbox, progress, watch)
            with closing(feed.reads()) as reads:
                run_all(run, reads)
        committed = {split: writer.committed(split) for split in SPLITS}
        seconds = split_waiting(watch.seconds, writer.watch.seconds)
        return HarvestReport(committed, _kinds(config.cache), len(writer.rejected), writer.complete, seconds)


def writer_threads() -> int:
    """Not torch's number: torchrun sets that to 1."""
    return min(MOST_WRITERS, cores())


def split_waiting(mine: Mapping[str, float], writers: Mapping[str, float]) -> dict[str, float]:
    """Seconds by what this process waited for; those that it waited for the writer, as whoever gave to the
    writer was held up, where encoding and writing go together in the ratio of the seconds that they took."""
    encode, write, encoded, synced, quantise = (
        writers.get(name, 0.0) for name in ("encode", "write", "wait encoded", "wait synced", "quantise")
    )
    disk = synced + encoded * write / (encode + write or 1.0)
    share = disk / (quantise + encoded + synced or 1.0)
    waited = mine.get("store", 0.0)
    found = {name: mine.get(name, 0.0) for name in ("samples", "device", "copy")}
    return {**found, "encode": waited * (1 - share), "disk": waited * share}


def say_columns(rows: Rows, config: HarvestConfig) -> None:
    """Print what is read from where; ValueError with the first row's keys where nothing is understood."""
    heads = [tuple(map(str, row)) for row in rows.head()]
    try:
        found = describe_columns(heads, config.text_column)
    except ValueError as fault:
        raise ValueError(f"{config.dataset}: {fault}") from fault
    if config.rank == 0:
        print(f"columns: {found}", file=sys.stderr, flush=True)


def say_missing(rank: int) -> None:
    """One line where the codec's compiled part is not installed."""
    if not COMPILED and rank == 0:
        print(f"harvest: {ADVICE}", file=sys.stderr, flush=True)


def _kinds(cache: Path) -> dict[str, dict[str, int]]:
    opened = open_cache(cache, check=False)
    return {split: {**opened[split].counts(), "sink": opened[split].n_sinks} for split in SPLITS}


def _tap(model: LoadedModel, hookpoints: Hookpoints, layers: tuple[int, ...]) -> MlpTaps:
    def chosen(paths: list[str]) -> list[nn.Module]:
        return [model.body.get_submodule(paths[layer]) for layer in layers]

    return MlpTaps(chosen(hookpoints.mlps), chosen(hookpoints.norms) if hookpoints.norms else None)


def _share(tokens: int, rank: int, world_size: int) -> int:
    return tokens // world_size + (rank < tokens % world_size)
