"""`clt harvest`: dataset and model in, cache out; stops cleanly, and goes on where it stopped.

Three things happen at once: threads of the feed read and prepare samples, this thread runs the model, and the
outbox's thread hands what came out to the writer, whose own threads quantise, encode and write.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..cache_format import CacheWriter, open_cache
from ..cache_format.layout import SPLITS, parse_layers
from ..cache_format.window import Values
from ..progress import Progress
from ..remote.address import remote_address
from ..remote.staging import folder_name
from ..remote.uploading import Upload
from ..stopping import StopRequested
from ..stopwatch import Stopwatch
from .batches import POOL_BATCHES, pack
from .columns import describe_columns
from .config import HarvestConfig
from .disk import check_disk
from .feed import Feed, Read, cores
from .forward import Forward, check_finite
from .identity import describe
from .landing import Landed, Landing, choose_form
from .mlps import Hookpoints, find_hookpoints
from .model import LoadedModel, load_model
from .outbox import Outbox
from .rows import Rows, open_rows
from .taps import MlpTaps
from .tokens import PreparedSample

BAD_FRACTION_AFTER = 100
"""Samples to see before --max-bad-fraction is judged; at the end of a dataset it always is."""


MOST_WRITERS = 16
"""Threads that quantise and encode; each wants memory for two shards."""


class HarvestReport(NamedTuple):
    tokens: dict[str, int]
    """Committed, by split (of this rank)."""
    kinds: dict[str, dict[str, int]]
    """Tokens by split and kind, and `sink` among them, of the whole cache as it stands."""
    rejected: int
    complete: bool
    seconds: dict[str, float]
    """What this process waited for: samples, device, copy, encode, disk."""


@dataclass
class _Harvest:
    """What the loop carries."""

    config: HarvestConfig
    feed: Feed
    forward: Forward
    writer: CacheWriter
    """Written to by the outbox's thread only."""
    outbox: Outbox
    progress: Progress
    watch: Stopwatch
    to_skip: dict[str, int]
    """Tokens that come again and are committed already."""
    planned: int
    """Tokens of split train that the outbox holds or has delivered."""
    known_bad: frozenset[int]
    """Rejected by an earlier run."""
    pools: dict[str, list[PreparedSample]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    seen: int = 0
    bad: int = 0

    @property
    def full(self) -> bool:
        """No more tokens of split train are wanted."""
        return self.writer.max_tokens is not None and self.planned >= self.writer.max_tokens


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
            check_disk(config, manifest, rows, model)
            done = writer.committed("train")
            progress = stack.enter_context(Progress("harvest", total=wanted, unit="tok", done=done))
            taps = stack.enter_context(_tap(model, hookpoints, layers))
            outbox = stack.enter_context(Outbox())
            landing = Landing(len(layers), choose_form(manifest, model.device), model.device, watch)
            forward = Forward(model, taps, landing, config.batch_tokens, watch)
            feed = Feed(rows, model, config, {split: writer.cursor(split) for split in SPLITS})
            run = _begin(config, feed, forward, writer, outbox, progress, watch)
            with closing(feed.reads()) as reads:
                _run(run, reads)
        committed = {split: writer.committed(split) for split in SPLITS}
        seconds = split_waiting(watch.seconds, writer.watch.seconds)
        return HarvestReport(committed, _kinds(config.cache), len(writer.rejected), writer.complete, seconds)


def writer_threads() -> int:
    """Not torch's number: torchrun sets that to 1."""
    return min(MOST_WRITERS, cores())


def split_waiting(mine: Mapping[str, float], writers: Mapping[str, float]) -> dict[str, float]:
    """Seconds by what this process waited for; those that it waited for the writer, in the ratio of the
    seconds that the writer's threads spent on encoding and on the disk."""
    disk = writers.get("disk", 0.0)
    busy = disk + writers.get("encode", 0.0) + writers.get("quantise", 0.0)
    share = disk / (busy or 1.0)
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


def _begin(
    config: HarvestConfig,
    feed: Feed,
    forward: Forward,
    writer: CacheWriter,
    outbox: Outbox,
    progress: Progress,
    watch: Stopwatch,
) -> _Harvest:
    return _Harvest(
        config=config,
        feed=feed,
        forward=forward,
        writer=writer,
        outbox=outbox,
        progress=progress,
        watch=watch,
        to_skip={split: writer.to_skip(split) for split in SPLITS},
        planned=writer.added("train"),
        known_bad=frozenset(writer.rejected),
    )


def _run(run: _Harvest, reads: Iterator[Read]) -> None:
    """Take samples in order; whenever a split's pool is full, run it through the model."""
    writer, config = run.writer, run.config
    limit = POOL_BATCHES * config.batch_tokens
    first = min(writer.cursor(split) for split in SPLITS) * config.world_size
    run.bad = sum(number < first for number in run.known_bad)
    while (read := _next(run, reads)) is not None:
        StopRequested.check()
        if run.full:
            break
        _take(run, read)
        for split in SPLITS:
            if sum(sample.length for sample in run.pools[split]) >= limit:
                _run_pool(run, split)
    for split in SPLITS:
        if run.pools[split]:
            _run_pool(run, split)
    with run.watch.measure("store"):
        run.outbox.drain()
        if writer.committed("train") == 0 and not writer.has_tokens:
            raise ValueError(
                f"{config.dataset}: of {run.seen} samples none could be stored; "
                f"see {config.cache / 'rejected.jsonl'}"
            )
        _judge(run)
        writer.finish()


def _next(run: _Harvest, reads: Iterator[Read]) -> Read | None:
    with run.watch.measure("samples"):
        return next(reads, None)


def _take(run: _Harvest, read: Read) -> None:
    """Pool a sample, or record why it cannot be had, and judge whether there are too many of those."""
    config = run.config
    run.seen = read.number // config.world_size + 1
    run.bad += read.reason is not None or read.number in run.known_bad
    if read.reason is not None:
        if config.on_bad_sample == "fail":
            raise ValueError(f"sample {read.id!r} (row {read.row}): {read.reason}")
        line = {"sample": read.number, "row": read.row, "id": read.id, "reason": read.reason}
        run.outbox.put_note(partial(run.writer.reject, read.number, line))
    elif read.prepared is not None:
        assert read.split is not None
        run.pools[read.split].append(read.prepared)
    if run.seen >= BAD_FRACTION_AFTER:
        _judge(run)


def _judge(run: _Harvest) -> None:
    """ValueError where more samples than allowed were bad so far."""
    config = run.config
    if run.bad > config.max_bad_fraction * run.seen:
        run.outbox.drain()
        raise ValueError(
            f"{run.bad} of {run.seen} samples are bad, more than --max-bad-fraction "
            f"{config.max_bad_fraction}; see {config.cache / 'rejected.jsonl'}, "
            "mend the dataset or raise the fraction"
        )


def _run_pool(run: _Harvest, split: str) -> None:
    pool, run.pools[split] = run.pools[split], []
    run.feed.keep_ahead(len(pool))  # the next pool, while this one goes through the model
    cursor = pool[0].number // run.config.world_size
    for samples in pack(pool, run.config.batch_tokens, run.config.shuffle_seed):
        StopRequested.check()
        if split == "train" and run.full:
            return
        stored = sum(len(sample.columns["sample"]) for sample in samples)
        skipped = min(stored, run.to_skip[split])
        run.to_skip[split] -= skipped
        if split == "train":
            run.planned += stored - skipped
        if skipped == stored > 0:
            run.outbox.put_note(partial(_skip, run.writer, split, cursor, stored))
            continue
        for part, landed in run.forward.compute(samples):
            run.outbox.put_batch(partial(_store, run, split, cursor, part, landed))


def _store(run: _Harvest, split: str, cursor: int, samples: list[PreparedSample], landed: Landed) -> None:
    """In the outbox's thread: give the writer each sample's part."""
    try:
        _add_all(run, split, cursor, samples, landed.values())
    finally:
        landed.release()
    _report(run)


def _add_all(run: _Harvest, split: str, cursor: int, samples: list[PreparedSample], values: Values) -> None:
    start = 0
    for sample in samples:
        rows = slice(start, start := start + len(sample.columns["sample"]))
        part = {site: value[rows] for site, value in values.items()}
        if run.config.precision == "bf16":  # int8 looks for itself
            check_finite(sample, part, run.writer.manifest.layers)
        run.writer.add(split, cursor, sample.line, sample.columns, part)


def _skip(writer: CacheWriter, split: str, cursor: int, tokens: int) -> None:
    assert writer.skippable(split, cursor, tokens)


def _report(run: _Harvest) -> None:
    writer = run.writer
    values = 2 * writer.manifest.n_layers * writer.manifest.d_model
    committed = writer.committed_here
    bits = f", {8 * writer.bytes_written / (committed * values):.2f} bits/value" if committed else ""
    run.progress.advance_to(writer.added("train"), f"{writer.bytes_written / 1e6:.0f} MB written{bits}")


def _kinds(cache: Path) -> dict[str, dict[str, int]]:
    opened = open_cache(cache, check=False)
    return {split: {**opened[split].counts(), "sink": opened[split].n_sinks} for split in SPLITS}


def _tap(model: LoadedModel, hookpoints: Hookpoints, layers: tuple[int, ...]) -> MlpTaps:
    def chosen(paths: list[str]) -> list[nn.Module]:
        return [model.body.get_submodule(paths[layer]) for layer in layers]

    return MlpTaps(chosen(hookpoints.mlps), chosen(hookpoints.norms) if hookpoints.norms else None)


def _share(tokens: int, rank: int, world_size: int) -> int:
    return tokens // world_size + (rank < tokens % world_size)
