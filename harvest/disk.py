"""How much room a harvest needs, known before its first token."""

import shutil
from itertools import islice

from ..cache_format import Manifest, open_cache
from ..cache_format.layout import SPLITS
from .config import HarvestConfig
from .feed import Feed
from .model import LoadedProcessor
from .rows import IndexedRows, Rows

RESERVE = 1.05
"""Ask for this much more than the codes before entropy coding: token table, statistics, journal."""
PROBE = 64
"""Samples, random ones since harvest order is, from whose lengths that of a whole dataset is judged."""


def check_disk(config: HarvestConfig, manifest: Manifest, rows: Rows, model: LoadedProcessor) -> None:
    """ValueError where the disk cannot hold what all ranks together have still to store.

    With --tokens that is a bound; of a whole dataset it is judged from PROBE samples; of a stream, whose end
    nobody knows, only the next windows of all ranks are asked for.
    """
    cache = open_cache(config.cache, check=False)
    missing = expected_tokens(config, manifest, rows, model) - sum(len(cache[split]) for split in SPLITS)
    needed = int(RESERVE * manifest.bytes_per_token * max(0, missing))
    if config.uploads:
        needed = min(needed, int(config.stage_gb * 1e9) + 2 * manifest.window * manifest.bytes_per_token)
    free = shutil.disk_usage(config.cache).free
    if needed > free:
        raise ValueError(
            f"{config.cache}: expected room for up to {_size(needed)} ({missing} more tokens of "
            f"{manifest.bytes_per_token} bytes), found {_size(free)} free; "
            "free some, choose another disk, or harvest fewer --tokens or --layers"
        )


def expected_tokens(config: HarvestConfig, manifest: Manifest, rows: Rows, model: LoadedProcessor) -> int:
    """Stored tokens of the whole cache, both splits."""
    if config.tokens is not None:
        return int(config.tokens / max(1e-9, 1 - config.val_fraction))
    if not isinstance(rows, IndexedRows):
        return manifest.window * manifest.world_size
    samples = min(len(rows), config.max_samples or len(rows))
    feed = Feed(rows, model, config, dict.fromkeys(SPLITS, 0))
    probed = min(PROBE, samples)
    reads = [feed.read(numbered) for numbered in islice(rows.walk(config.shuffle_seed, 0, 1), probed)]
    stored = sum(len(read.prepared.columns["sample"]) for read in reads if read.prepared)
    return stored * samples // max(1, probed)


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
