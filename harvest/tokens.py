"""A sample as the model's input, and for each token what it is: kind, and the patch's row and column."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..cache_format.layout import KINDS
from ..cache_format.permutation import random_words
from .config import HarvestConfig
from .crop import seen_box
from .model import LoadedProcessor
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
    if sample.turns:
        inputs, in_content = _tokenise_turns(sample, model)
    else:
        encoded = model.tokenizer(sample.text, return_tensors="pt")
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        in_content = np.ones(inputs["input_ids"].shape[1], bool)
    ids = inputs["input_ids"][0].numpy()
    if model.image_token in ids and not sample.pictures:
        raise BadSample("the text holds the model's image token, but no image is given")
    kind = _kinds(ids, in_content, model)
    row, col, picture = _patches(ids, model, len(sample.pictures))
    length = min(len(ids), config.ctx_len)
    if (kind[length:] == IMAGE).any():
        end = int(np.flatnonzero(kind == IMAGE)[-1]) + 1
        raise BadSample(f"an image ends at token {end}, beyond ctx-len {config.ctx_len}")
    keep = _chosen(kind[:length], picture[:length], number, config)
    full = {
        "sample": np.full(length, number),
        "position": np.arange(length),
        "token_id": ids[:length],
        "kind": kind[:length],
        "row": row[:length],
        "col": col[:length],
    }
    line = {
        "sample": number,
        "id": sample.id,
        "images": _describe_pictures(sample, model, row, col, picture),
        "length": length,
        "cut": len(ids) - length,
        "stored": int(keep.sum()),
    }
    cut = {name: value[:, :length] if name in SEQUENCE_INPUTS else value for name, value in inputs.items()}
    return PreparedSample(number, cut, keep, {name: column[keep] for name, column in full.items()}, line)


def _tokenise_turns(
    sample: Sample, model: LoadedProcessor
) -> tuple[dict[str, Tensor], npt.NDArray[np.bool_]]:
    """The processor's output, and (token,) whether a token is content rather than the chat template's."""
    if model.tokenizer.chat_template is None and getattr(model.processor, "chat_template", None) is None:
        raise ValueError(
            f"{model.name} has no chat template, so it cannot read conversations; harvest plain text"
        )
    rendered = render(sample, model)
    spans = _content_spans(sample, rendered)
    bos = model.tokenizer.bos_token
    special = not (bos and rendered.startswith(bos))
    plain = model.tokenizer(rendered, add_special_tokens=special, return_offsets_mapping=True)
    content = [any(a < end and start < b for a, b in spans) for start, end in plain["offset_mapping"]]
    if not sample.pictures:
        inputs = {name: torch.tensor([plain[name]]) for name in ("input_ids", "attention_mask")}
        return inputs, np.array(content, bool)
    if model.image_token is None:
        raise BadSample(f"{model.name} is a language model: it cannot read images")
    pictures = [picture.image for picture in sample.pictures]
    try:
        full = model.processor(
            text=rendered, images=pictures, add_special_tokens=special, return_tensors="pt"
        )
    except (ValueError, IndexError) as fault:
        raise BadSample(f"the model's processor cannot take it: {fault}") from fault
    inputs = {name: value for name, value in full.items() if isinstance(value, Tensor)}
    ids = inputs["input_ids"][0].tolist()
    return inputs, _carry_over(plain["input_ids"], content, ids, model.image_token)


def render(sample: Sample, model: LoadedProcessor) -> str:
    """The conversation as the model's chat template writes it, `<image>` standing for each picture."""
    as_parts = model.image_token is not None
    messages = [
        {
            "role": turn.role,
            "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in turn.parts]
            if as_parts
            else "".join(part or "" for part in turn.parts),
        }
        for turn in sample.turns
    ]
    speaker = model.processor if as_parts else model.tokenizer
    text: str = speaker.apply_chat_template(messages, tokenize=False)
    return text


def _content_spans(sample: Sample, rendered: str) -> list[tuple[int, int]]:
    """Where each text of the conversation stands in the rendered prompt (templates may trim it)."""
    spans, at = [], 0
    for turn in sample.turns:
        for part in turn.parts:
            found = -1 if part is None else rendered.find(part.strip(), at)
            if part is not None and found >= 0:
                at = found + len(part.strip())
                spans.append((found, at))
    return spans


def _carry_over(
    plain: list[int], content: list[bool], expanded: list[int], image_token: int
) -> npt.NDArray[np.bool_]:
    """Content flags for `expanded`, which is `plain` with each image token grown into many."""
    flags, at = np.zeros(len(expanded), bool), 0
    for place, token in enumerate(expanded):
        if token == image_token:
            continue
        while at < len(plain) and plain[at] == image_token:
            at += 1
        if at < len(plain) and plain[at] == token:
            flags[place], at = content[at], at + 1
    return flags


def _kinds(
    ids: npt.NDArray[np.int64], in_content: npt.NDArray[np.bool_], model: LoadedProcessor
) -> npt.NDArray[np.uint8]:
    kind = np.where(in_content, TEXT, TEMPLATE).astype(np.uint8)
    kind[np.isin(ids, model.tokenizer.all_special_ids)] = TEMPLATE
    if len(ids) and ids[0] == model.tokenizer.bos_token_id:
        kind[0] = BOS
    if model.image_token is not None:
        kind[ids == model.image_token] = IMAGE
    return kind


def _patches(
    ids: npt.NDArray[np.int64], model: LoadedProcessor, n_pictures: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16], npt.NDArray[np.int16]]:
    """Row and column of each image token on its picture's square grid, and which picture; -1 elsewhere."""
    row, col, picture = np.full((3, len(ids)), -1, np.int16)
    if model.image_token is None or n_pictures == 0:
        return row, col, picture
    places = np.flatnonzero(ids == model.image_token)
    each = len(places) // n_pictures
    side = round(each**0.5)
    if side * side * n_pictures != len(places):
        raise BadSample(f"{len(places)} image tokens for {n_pictures} images form no square grids")
    patch = np.arange(len(places)) % each
    row[places], col[places] = patch // side, patch % side
    picture[places] = np.arange(len(places)) // each
    return row, col, picture


def _describe_pictures(
    sample: Sample,
    model: LoadedProcessor,
    row: npt.NDArray[np.int16],
    col: npt.NDArray[np.int16],
    picture: npt.NDArray[np.int16],
) -> list[dict[str, Any]]:
    """For samples.jsonl: each file, the positions of its tokens, its grid, the box that the grid covers."""
    lines = []
    for number, given in enumerate(sample.pictures):
        places = np.flatnonzero(picture == number)
        box = seen_box(getattr(model.processor, "image_processor", None), given.size)
        line: dict[str, Any] = {"file": given.reference, "sha256": given.sha256, "size": list(given.size)}
        if given.frames > 1:
            line["frames"] = given.frames
        line["positions"] = [int(places[0]), int(places[-1]) + 1]
        line["grid"] = [int(row[places].max()) + 1, int(col[places].max()) + 1]
        line["crop"] = None if box is None else [round(edge, 3) for edge in box]
        lines.append(line)
    return lines


def _chosen(
    kind: npt.NDArray[np.uint8], picture: npt.NDArray[np.int16], number: int, config: HarvestConfig
) -> npt.NDArray[np.bool_]:
    """(token,) whether it is stored: not of an excluded kind, and within its image's sampled fraction."""
    keep = ~np.isin(kind, [KINDS.index(name) for name in config.exclude])
    if config.keep_image_tokens < 1:
        for nth in range(int(picture.max(initial=-1)) + 1):
            tokens = np.flatnonzero(picture == nth)
            wanted = round(config.keep_image_tokens * len(tokens))
            words = random_words(len(tokens), config.shuffle_seed, number, nth)
            keep[tokens[np.argsort(words, kind="stable")[wanted:]]] = False
    return keep
