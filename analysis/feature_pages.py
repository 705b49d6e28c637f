"""The folder of pages: static files that open from disk, with the data as scripts that are loaded when asked.

index.html, pages.css, pages.js     the pages
data/run.js                         the run, the cache, and which samples are in which file
data/list-<layer>.js                every latent of a layer, for the list
data/latents-<layer>-<block>.js     what the pages of 32 latents show
data/samples-<block>.js             32 samples: token strings, pictures, rectangles of patches
pictures/                           each once, made small
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..cache_format.files import write_file
from ..cache_format.layout import KINDS
from .chosen import TOP, Activations, Chosen
from .directions import Directions, Tokens
from .sample_pages import IMAGE, Strings, TokenTable, write_data

BLOCK = 32
"""Latents in one file."""
LOOKED_UP = 1 << 22
"""Activations that are held at a time while examples are looked up."""
LABEL = 3
"""Token strings that stand for a latent in the list."""
STATIC = ("index.html", "pages.css", "pages.js")


class LayerPages(NamedTuple):
    """What there is to show of one layer; of its examples, those of some latents."""

    layer: int
    by_kind: npt.NDArray[np.int64]
    """(latent, kind)"""
    histogram: npt.NDArray[np.int64]
    chosen: Chosen
    activations: Activations
    directions: Directions


class Row(NamedTuple):
    """Of a latent in the list."""

    label: list[str]
    pictures: int
    """Strongest examples that are on a patch"""
    largest: float


def together(by_kind: npt.NDArray[np.int64], most: int) -> Iterator[range]:
    """Latents whose examples are held together, whole files of them: with at most LOOKED_UP activations.

    by_kind (latent, kind): how often they are positive; most: tokens in a latent's examples. A latent has no
    more activations in its examples than either, for these are of different samples.
    """
    bound = np.minimum(by_kind.sum(axis=1), most)
    starts = np.arange(0, len(bound), BLOCK)
    first, held = 0, 0
    for start, size in zip(starts.tolist(), np.add.reduceat(bound, starts).tolist(), strict=True):
        if held and held + size > LOOKED_UP:
            yield range(first, start)
            first, held = start, 0
        held += size
    yield range(first, len(bound))


def write_latents(
    folder: Path, pages: LayerPages, latents: range, table: TokenTable, strings: Strings
) -> list[Row]:
    """Files of these latents, and their rows of the list."""
    for first in latents[::BLOCK]:
        block = [_latent(pages, n, table, strings) for n in range(first, min(first + BLOCK, latents.stop))]
        write_data(folder, f"latents-{pages.layer}-{first // BLOCK}", block)
    return [_row(pages, latent, table, strings) for latent in latents]


def write_list(folder: Path, layer: int, by_kind: npt.NDArray[np.int64], rows: list[Row]) -> None:
    """A layer's part of the list."""
    data = {
        "kinds": by_kind.T.tolist(),
        "max": significant(np.array([row.largest for row in rows])).tolist(),
        "label": [row.label for row in rows],
        "pictures": [row.pictures for row in rows],
    }
    write_data(folder, f"list-{layer}", data)


def _row(pages: LayerPages, latent: int, table: TokenTable, strings: Strings) -> Row:
    mine = pages.chosen.of(latent)
    top = slice(mine.start, mine.start + int((pages.chosen.quantile[mine] == TOP).sum()))
    return Row(
        _label(_words_of(pages, top, table), table, strings),
        int((table.kind[pages.chosen.token[top]] == IMAGE).sum()),
        float(pages.chosen.value[top].max(initial=0)),
    )


def write_pages(folder: Path, about: dict[str, Any]) -> None:
    """The pages themselves, and what they must know of the run."""
    write_data(folder, "run", {**about, "latent_block": BLOCK, "kind_names": KINDS})
    for name in STATIC:
        source = Path(__file__).with_name(name.replace("index", "pages"))
        write_file(folder / name, source.read_bytes())


def _words_of(pages: LayerPages, top: slice, table: TokenTable) -> npt.NDArray[np.int64]:
    """Each example's token; of one on a patch the strongest other token of its sample, if there is any."""
    words = []
    for example in range(top.start, top.stop):
        token = int(pages.chosen.token[example])
        if table.kind[token] == IMAGE:
            span = slice(*pages.activations.starts[example : example + 2].tolist())
            active = pages.activations.token[span]
            others = np.flatnonzero(table.kind[active] != IMAGE)
            if not len(others):
                continue
            token = int(active[others[pages.activations.value[span][others].argmax()]])
        words.append(token)
    return np.array(words, np.int64)


def _label(words: npt.NDArray[np.int64], table: TokenTable, strings: Strings) -> list[str]:
    """The strings most frequent among the top examples, those of higher activation first among equals."""
    ids = table.columns["token_id"][words].tolist()
    counts = Counter(_shown(strings(i) or f"#{i}") for i in ids)
    return [text for text, _ in counts.most_common(LABEL)]


def _shown(text: str) -> str:
    """Without blanks at its ends; of blanks alone, signs for them."""
    return text.strip() or text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")


def _latent(pages: LayerPages, latent: int, table: TokenTable, strings: Strings) -> dict[str, Any]:
    weights = pages.directions
    filled = np.flatnonzero(pages.histogram[latent])
    first, end = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
    found = {
        "histogram": [first, pages.histogram[latent, first:end].tolist()],
        "targets": significant(weights.target_norms[latent]).tolist(),
        "similar": [
            [other, round(encoder, 3), round(decoder, 3)]
            for other, encoder, decoder in zip(
                weights.similar[latent].tolist(),
                weights.encoder_cosine[latent].tolist(),
                weights.decoder_cosine[latent].tolist(),
                strict=True,
            )
        ],
        "examples": _examples(pages, latent, table),
    }
    if weights.promoted is not None and weights.suppressed is not None:
        ends = {"promoted": weights.promoted, "suppressed": weights.suppressed}
        found |= {name: _words(tokens, latent, strings) for name, tokens in ends.items()}
    return found


def _words(tokens: Tokens, latent: int, strings: Strings) -> list[list[Any]]:
    change = significant(tokens.change[latent]).tolist()
    return [[strings(i) or f"#{i}", c] for i, c in zip(tokens.ids[latent].tolist(), change, strict=True)]


def _examples(pages: LayerPages, latent: int, table: TokenTable) -> list[list[Any]]:
    """[sample, place of the token, quantile or -1, places where it is active, activations there]"""
    chosen, found = pages.chosen, pages.activations
    examples = []
    for example in range(*chosen.of(latent).indices(len(chosen.latent))):
        token = int(chosen.token[example])
        span = slice(int(found.starts[example]), int(found.starts[example + 1]))
        place = table.rank[found.token[span]]
        order = np.argsort(place, kind="stable")
        values = significant(found.value[span][order]).tolist()
        quantile = round(float(chosen.quantile[example]), 3)
        head = [int(table.sample[token]), int(table.rank[token]), quantile]
        examples.append([*head, place[order].tolist(), values])
    return examples


def significant(values: npt.NDArray[Any], digits: int = 4) -> npt.NDArray[np.float64]:
    """Rounded to so many significant digits."""
    values = values.astype(np.float64)
    size = 10.0 ** (digits - 1 - np.floor(np.log10(np.maximum(np.abs(values), 1e-30))))
    rounded: npt.NDArray[np.float64] = np.round(values * size) / size
    return rounded
