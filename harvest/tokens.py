"""A sample as the model's input, and for each token what it is: kind, and the patch's row and column."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..cache_format.layout import KINDS
from ..cache_format.permutation import random_words
from .config import HarvestConfig
from .grids import PlacedTile, Places
from .model import LoadedProcessor
from .prompts import tokenise
from .rows import BadSample
from .samples import Sample

TEXT, IMAGE, BOS, TEMPLATE = range(len(KINDS))
SEQUENCE_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class PreparedSample:
    """One sample, ready to be batched."""

    number: int
    """Among all samples of the dataset, in harvest order."""
    inputs: dict[str, Tensor]
    """The processor's output, batch axis of 1 (pictures: one row a picture), cut to ctx-len."""
    keep: npt.NDArray[np.bool_]
    """(token,): stored"""
    columns: dict[str, npt.NDArray[Any]]
    """Of the stored tokens: sample, position, token_id, kind, row, col."""
    line: dict[str, Any]
    """For samples.jsonl."""

    @property
    def length(self) -> int:
        return len(self.keep)


def prepare(sample: Sample, number: int, model: LoadedProcessor, config: HarvestConfig) -> PreparedSample:
    """Tokenise, tell the kinds apart, cut to ctx-len, choose what is stored; BadSample with a reason."""
    inputs, content, places = tokenise(sample, model)
    ids = inputs["input_ids"][0].numpy()
    if not len(ids):
        raise BadSample("no tokens")
    kind = _kinds(ids, content, places, model)
    length = min(len(ids), config.ctx_len)
    if (places.picture[length:] >= 0).any():
        end = int(np.flatnonzero(places.picture >= 0)[-1]) + 1
        raise BadSample(f"an image ends at token {end}, beyond ctx-len {config.ctx_len}; raise --ctx-len")
    keep = _chosen(kind[:length], places.picture[:length], number, config)
    full = {
        "sample": np.full(length, number),
        "position": np.arange(length),
        "token_id": ids[:length],
        "kind": kind[:length],
        "row": places.row[:length],
        "col": places.col[:length],
    }
    line = {
        "sample": number,
        "id": sample.id,
        "images": _describe_pictures(sample, places.tiles),
        "length": length,
        "cut": len(ids) - length,
        "stored": int(keep.sum()),
    }
    cut = {name: value[:, :length] if name in SEQUENCE_INPUTS else value for name, value in inputs.items()}
    return PreparedSample(number, cut, keep, {name: column[keep] for name, column in full.items()}, line)


def _kinds(
    ids: npt.NDArray[np.int64], content: npt.NDArray[np.bool_], places: Places, model: LoadedProcessor
) -> npt.NDArray[np.uint8]:
    """Image tokens that are no patch (newlines between rows) are the processor's writing: template."""
    kind = np.where(content, TEXT, TEMPLATE).astype(np.uint8)
    kind[np.isin(ids, model.tokenizer.all_special_ids)] = TEMPLATE
    images = places.picture >= 0
    first = int(np.argmin(images)) if len(ids) else 0  # PaliGemma puts its images in front of BOS
    if len(ids) and ids[first] == model.tokenizer.bos_token_id:
        kind[first] = BOS
    known = np.isin(places.picture, [nth for nth, tiles in enumerate(places.tiles) if tiles[0].tile])
    kind[images] = np.where(known & (places.row < 0), TEMPLATE, IMAGE)[images]
    return kind


def _describe_pictures(sample: Sample, tiles: list[list[PlacedTile]]) -> list[dict[str, Any]]:
    """For samples.jsonl: each file, the positions of its tokens, and the grids that they form."""
    lines = []
    for given, placed in zip(sample.pictures, tiles, strict=True):
        line: dict[str, Any] = {"file": given.reference, "sha256": given.sha256, "size": list(given.size)}
        if given.frames > 1:
            line["frames"] = given.frames
        shrink = given.size[0] / given.image.size[0]
        described = [_describe_tile(tile, shrink) for tile in placed]
        line["positions"] = [placed[0].start, placed[-1].stop]
        line |= {"grid": None, "crop": None, "tiles": described} if len(placed) > 1 else described[0]
        lines.append(line)
    return lines


def _describe_tile(placed: PlacedTile, shrink: float) -> dict[str, Any]:
    """shrink: from the picture that the processor was given to the original."""
    tile = placed.tile
    return {
        "positions": [placed.start, placed.stop],
        "grid": None if tile is None else [tile.rows, tile.cols],
        "crop": None if tile is None else [round(edge * shrink, 3) for edge in tile.box],
    }


def _chosen(
    kind: npt.NDArray[np.uint8], picture: npt.NDArray[np.int16], number: int, config: HarvestConfig
) -> npt.NDArray[np.bool_]:
    """(token,) whether it is stored: not of an excluded kind, and within its image's sampled fraction."""
    keep = ~np.isin(kind, [KINDS.index(name) for name in config.exclude])
    if config.keep_image_tokens < 1:
        for nth in range(int(picture.max(initial=-1)) + 1):
            tokens = np.flatnonzero((picture == nth) & (kind == IMAGE))
            wanted = round(config.keep_image_tokens * len(tokens))
            words = random_words(len(tokens), config.shuffle_seed, number, nth)
            keep[tokens[np.argsort(words, kind="stable")[wanted:]]] = False
    return keep
