"""`clt harvest --dry-run`: what a harvest would store and how large it would be, told without the weights.

The whole dataset is walked as the harvest would walk it: read, decoded, tokenised, cut, chosen from.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..cache_format import Manifest
from ..cache_format.layout import KINDS, SPLITS, parse_layers
from ..progress import Progress
from ..stopping import StopRequested
from .config import PRECISIONS, HarvestConfig
from .feed import Feed, Read
from .model import LoadedProcessor, load_processor
from .provenance import printable
from .rows import Rows, open_rows
from .run import say_columns
from .tokens import PreparedSample

EXAMPLES = 3
MOST_SHOWN = 10
"""Rejected samples that are printed."""
IMAGE, LEFT_OUT = "image", "left out"
"""In place of a kind: a token that is not stored."""
COLOURS = {"text": "0", IMAGE: "36", "bos": "35", "template": "33", LEFT_OUT: "2;9"}
"""Of a kind on a terminal, as SGR codes: plain, cyan, magenta, yellow, faint and struck through."""


class Stretch(NamedTuple):
    """Neighbouring tokens of one kind; the tokens of a picture stay together."""

    kind: str
    tokens: int
    stored: int
    text: str


class Example(NamedTuple):
    id: str
    split: str
    length: int
    cut: int
    stretches: list[Stretch]


class DryRun(NamedTuple):
    samples: dict[str, int]
    """By split, of this rank."""
    tokens: dict[str, dict[str, int]]
    """Stored tokens by split and kind, of this rank."""
    cut: int
    """Samples whose text is longer than ctx-len."""
    rejected: list[dict[str, Any]]
    """row, id and reason of each."""
    bytes: dict[str, int]
    """By precision, of both splits, before entropy coding."""
    examples: list[Example]


def dry_run(config: HarvestConfig, rows: Rows, processor: LoadedProcessor) -> DryRun:
    samples: Counter[str] = Counter()
    tokens = {split: np.zeros(len(KINDS), np.int64) for split in SPLITS}
    found = DryRun(samples, {}, 0, [], {}, [])
    n_cut = 0
    with (
        Progress("dry run", total=config.max_samples, unit="samples", leave=False) as progress,
        closing(Feed(rows, processor, config, dict.fromkeys(SPLITS, 0)).reads()) as feed,
    ):
        for read in feed:
            StopRequested.check()
            progress.add(1)
            if read.prepared is None:
                found.rejected.append({"row": read.row, "id": read.id, "reason": read.reason})
                continue
            assert read.split is not None
            samples[read.split] += 1
            tokens[read.split] += np.bincount(read.prepared.columns["kind"], minlength=len(KINDS))
            n_cut += read.prepared.line["cut"] > 0
            if len(found.examples) < EXAMPLES:
                found.examples.append(_example(read, read.prepared, processor))
            if config.tokens is not None and tokens["train"].sum() >= config.tokens // config.world_size:
                break
    stored = int(sum(counts.sum() for counts in tokens.values()))
    return found._replace(
        tokens={split: dict(zip(KINDS, map(int, counts), strict=True)) for split, counts in tokens.items()},
        cut=n_cut,
        bytes={name: stored * bytes_per_token(config, processor, name) for name in PRECISIONS},
    )


def look(config: HarvestConfig) -> DryRun:
    """Open dataset and processor, and walk."""
    rows = open_rows(config.dataset, config.split)
    say_columns(rows, config)
    return dry_run(config, rows, load_processor(config))


def bytes_per_token(config: HarvestConfig, processor: LoadedProcessor, precision: str) -> int:
    """Of all layers and both sites, as the cache's own formula has it."""
    return Manifest(
        d_model=processor.d_model,
        layers=parse_layers(config.layers, tuple(range(processor.n_layers))),
        precision=precision,
        step_divisor=config.step_divisor if precision == "int8" else 0.0,
        window=config.window,
        seed=config.shuffle_seed,
        world_size=config.world_size,
        source={},
    ).bytes_per_token


def _example(read: Read, sample: PreparedSample, processor: LoadedProcessor) -> Example:
    assert read.split is not None
    ids = sample.inputs["input_ids"][0].numpy()
    kinds = np.full(sample.length, -1)
    kinds[sample.columns["position"]] = sample.columns["kind"]
    groups = np.where(ids == processor.image_token, len(KINDS), kinds)
    starts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), sample.length]
    stretches = []
    for start, stop in pairwise(starts):
        stored, is_picture = int((kinds[start:stop] >= 0).sum()), groups[start] == len(KINDS)
        kind = LEFT_OUT if not stored else IMAGE if is_picture else KINDS[kinds[start]]
        text = processor.tokenizer.decode(ids[start : start + 1 if is_picture else stop].tolist())
        stretches.append(Stretch(kind, stop - start, stored, printable(text)))
    return Example(read.id, read.split, sample.length, sample.line["cut"], stretches)


def render(found: DryRun, colours: bool) -> str:
    """For people; `colours`: with ANSI sequences."""
    return "\n".join([*_render_counts(found), *_render_rejected(found), *_render_examples(found, colours)])


def _render_counts(found: DryRun) -> Iterator[str]:
    for split, kinds in found.tokens.items():
        told = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        yield f"{split}: {sum(kinds.values())} tokens of {found.samples.get(split, 0)} samples: {told}"
    sizes = ", ".join(f"{_size(size)} in {name}" for name, size in found.bytes.items())
    yield f"up to {sizes} (before entropy coding)"
    yield f"{found.cut} samples are longer than --ctx-len; their text is cut at the end"


def _render_rejected(found: DryRun) -> Iterator[str]:
    yield f"{len(found.rejected)} samples rejected"
    for line in found.rejected[:MOST_SHOWN]:
        yield f"  row {line['row']}, id {line['id']!r}: {printable(str(line['reason']))}"
    if len(found.rejected) > MOST_SHOWN:
        yield f"  ... and {len(found.rejected) - MOST_SHOWN} more"


def _render_examples(found: DryRun, colours: bool) -> Iterator[str]:
    if colours and found.examples:
        yield "kinds: " + " ".join(_coloured(kind, kind) for kind in COLOURS)
    for example in found.examples:
        cut = f", {example.cut} more cut off" if example.cut else ""
        yield f"sample {example.id!r}, {example.split}, {example.length} tokens{cut}:"
        if colours:
            words = "".join(_coloured(stretch.kind, _told(stretch)) for stretch in example.stretches)
            yield "  " + words.replace("\n", "\n  ")
            continue
        for stretch in example.stretches:
            yield f"  {stretch.kind:<9}{_told(stretch)!r}"


def _told(stretch: Stretch) -> str:
    """One picture is hundreds of tokens that read alike."""
    if stretch.kind != IMAGE:
        return stretch.text
    of = "" if stretch.stored == stretch.tokens else f"{stretch.stored} of "
    return f"{stretch.text} x {of}{stretch.tokens}"


def _coloured(kind: str, text: str) -> str:
    return f"\x1b[{COLOURS[kind]}m{text}\x1b[0m"


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
