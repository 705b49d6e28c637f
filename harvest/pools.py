"""The loop of a harvest: samples gather in a pool for each split, and pools go through the model in batches.

A pool is packed by length, so a batch's samples may come from anywhere in it; the cursor that is committed
with a window is where its pool began.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from ..cache_format import CacheWriter
from ..cache_format.layout import SPLITS
from ..cache_format.window import Values
from ..progress import Progress
from ..stopping import StopRequested
from ..stopwatch import Stopwatch
from .batches import pack, wants_more
from .config import HarvestConfig
from .feed import Feed, Read
from .forward import Forward, check_finite
from .landing import Landed
from .outbox import Outbox
from .tokens import PreparedSample

BAD_FRACTION_AFTER = 100
"""Samples to see before --max-bad-fraction is judged; at the end of a dataset it always is."""


@dataclass
class Harvest:
    """What the loop carries."""

    config: HarvestConfig
    feed: Feed
    forward: Forward
    writer: CacheWriter
    """Written to by what the outbox does only."""
    outbox: Outbox
    progress: Progress
    watch: Stopwatch
    pools: dict[str, list[PreparedSample]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    to_skip: dict[str, int] = field(init=False)
    """Tokens that come again and are committed already."""
    planned: int = field(init=False)
    """Tokens of split train that the outbox holds or has delivered."""
    known_bad: frozenset[int] = field(init=False)
    """Rejected by an earlier run."""
    seen: int = 0
    bad: int = 0

    def __post_init__(self) -> None:
        self.to_skip = {split: self.writer.to_skip(split) for split in SPLITS}
        self.planned = self.writer.added("train")
        self.known_bad = frozenset(self.writer.rejected)

    @property
    def full(self) -> bool:
        """No more tokens of split train are wanted."""
        return self.writer.max_tokens is not None and self.planned >= self.writer.max_tokens


def run_all(run: Harvest, reads: Iterator[Read]) -> None:
    """Take samples in order; whenever a split's pool is full, run it through the model."""
    writer, config = run.writer, run.config
    first = min(writer.cursor(split) for split in SPLITS) * config.world_size
    run.bad = sum(number < first for number in run.known_bad)
    while (read := _next(run, reads)) is not None:
        StopRequested.check()
        if run.full:
            break
        _take(run, read)
        for split in SPLITS:
            pool = run.pools[split]
            if pool and not wants_more(pool, _place(run, pool), config.batch_tokens):
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


def _next(run: Harvest, reads: Iterator[Read]) -> Read | None:
    with run.watch.measure("samples"):
        return next(reads, None)


def _take(run: Harvest, read: Read) -> None:
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


def _judge(run: Harvest) -> None:
    """ValueError where more samples than allowed were bad so far."""
    config = run.config
    if run.bad > config.max_bad_fraction * run.seen:
        run.outbox.drain()
        raise ValueError(
            f"{run.bad} of {run.seen} samples are bad, more than --max-bad-fraction "
            f"{config.max_bad_fraction}; see {config.cache / 'rejected.jsonl'}, "
            "mend the dataset or raise the fraction"
        )


def _run_pool(run: Harvest, split: str) -> None:
    pool, run.pools[split] = run.pools[split], []
    cursor = _place(run, pool)
    # the next pool, which may be twice as large where pools still grow, while this one goes through the model
    run.feed.keep_ahead(2 * len(pool) if len(pool) >= cursor else len(pool))
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
            store = partial(_store, run, split, cursor, part, landed)
            run.outbox.put_batch(store if run.outbox.beside else partial(_pause, run, store))


def _place(run: Harvest, pool: list[PreparedSample]) -> int:
    """Of its first sample in this rank's order."""
    return pool[0].number // run.config.world_size


def _store(run: Harvest, split: str, cursor: int, samples: list[PreparedSample], landed: Landed) -> None:
    """Give the writer each sample's part."""
    try:
        _add_all(run, split, cursor, samples, landed.values())
    finally:
        landed.release()
    _report(run)


def _pause(run: Harvest, store: Callable[[], None]) -> None:
    """Nothing else is done until what is full is encoded."""
    with run.watch.measure("store"):
        store()
        run.writer.wait_encoded()


def _add_all(run: Harvest, split: str, cursor: int, samples: list[PreparedSample], values: Values) -> None:
    start = 0
    for sample in samples:
        rows = slice(start, start := start + len(sample.columns["sample"]))
        part = {site: value[rows] for site, value in values.items()}
        if run.config.precision == "bf16":  # int8 looks for itself
            check_finite(sample, part, run.writer.manifest.layers)
        run.writer.add(split, cursor, sample.line, sample.columns, part)


def _skip(writer: CacheWriter, split: str, cursor: int, tokens: int) -> None:
    assert writer.skippable(split, cursor, tokens)


def _report(run: Harvest) -> None:
    writer = run.writer
    values = 2 * writer.manifest.n_layers * writer.manifest.d_model
    committed = writer.committed_here
    bits = f", {8 * writer.bytes_written / (committed * values):.2f} bits/value" if committed else ""
    run.progress.advance_to(writer.added("train"), f"{writer.bytes_written / 1e6:.0f} MB written{bits}")
