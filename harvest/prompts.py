"""A sample as the model's input, and which of its tokens are content rather than the chat template's."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .grids import Places, Prompt, find_runs, no_places, place_patches
from .model import LoadedProcessor
from .rows import BadSample
from .samples import Sample

ANSWERS_APART = ("PaliGemmaProcessor",)
"""Processors that take a question and an answer, and no chat template."""
NOT_FOR_THE_MODEL = ("labels",)


class Tokenised(NamedTuple):
    inputs: dict[str, Tensor]
    """What the processor gave, batch axis of 1 (pictures: one row a picture)."""
    content: npt.NDArray[np.bool_]
    """(token,): of the sample's own text"""
    places: Places


class _Rendered(NamedTuple):
    text: str
    """What the processor is given."""
    more: dict[str, Any]
    """Its further arguments."""
    plain: str
    """All text that becomes tokens, a placeholder standing for each picture."""


def tokenise(sample: Sample, model: LoadedProcessor) -> Tokenised:
    """The processor's output; BadSample, with a reason, where it has none."""
    if not sample.turns:
        encoded = model.tokenizer(sample.text)
        return _tokenised_text(encoded, np.ones(len(encoded["input_ids"]), bool), model)
    rendered = _render(sample, model)
    bos = model.tokenizer.bos_token
    special = not (rendered.more or (bos and rendered.text.startswith(bos)))
    plain = model.tokenizer(rendered.plain, add_special_tokens=special, return_offsets_mapping=True)
    content = _touching(plain["offset_mapping"], _content_spans(sample, rendered.plain))
    if not sample.pictures:
        return _tokenised_text(plain, content, model)
    if model.image_token is None:
        raise BadSample(f"{model.name} is a language model: it cannot read images")
    inputs = _run_processor(rendered, sample, model, special)
    holders = _touching(plain["offset_mapping"], _find_all(rendered.plain, placeholder(model)))
    ids = inputs["input_ids"][0].numpy()
    sizes = [picture.image.size for picture in sample.pictures]
    prompt = Prompt(model.processor, inputs, sizes, find_runs(ids == model.image_token))
    places = place_patches(prompt, len(ids))
    flags = _carry_over(np.array(plain["input_ids"]), content, holders, ids, places.picture)
    return Tokenised(inputs, flags, places)


def render(sample: Sample, model: LoadedProcessor) -> str:
    """The conversation as the model's chat template writes it, a placeholder standing for each picture."""
    return _render(sample, model).plain


def placeholder(model: LoadedProcessor) -> str:
    """The text that stands for a picture in a prompt."""
    given = getattr(model.processor, "image_token", None)
    return str(given or model.tokenizer.convert_ids_to_tokens(model.image_token))


def _render(sample: Sample, model: LoadedProcessor) -> _Rendered:
    if type(model.processor).__name__ in ANSWERS_APART:
        return _render_answer_apart(sample, model)
    if model.tokenizer.chat_template is None and getattr(model.processor, "chat_template", None) is None:
        raise ValueError(
            f"{model.name} has no chat template, so it cannot read conversations; harvest plain text"
        )
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
    return _Rendered(text, {}, text)


def _render_answer_apart(sample: Sample, model: LoadedProcessor) -> _Rendered:
    """Pictures, a question and an answer, as PaliGemma was trained on them."""
    roles = [turn.role for turn in sample.turns]
    if roles not in (["user"], ["user", "assistant"]) or not sample.pictures:
        raise BadSample(
            f"{model.name} reads images with a question and one answer, "
            f"found {len(sample.pictures)} images and turns of {', '.join(roles)}"
        )
    question, answer = ("".join(p or "" for p in turn.parts) for turn in [*sample.turns, sample.turns[0]][:2])
    text = placeholder(model) * len(sample.pictures) + question
    if len(roles) == 1:
        return _Rendered(text, {"add_special_tokens": False}, text)
    return _Rendered(text, {"add_special_tokens": False, "suffix": answer}, f"{text}\n{answer}")


def _run_processor(
    rendered: _Rendered, sample: Sample, model: LoadedProcessor, special: bool
) -> dict[str, Tensor]:
    tags = rendered.text.count(placeholder(model))
    if tags != len(sample.pictures):
        raise BadSample(
            f"the text holds {placeholder(model)!r}, which stands for an image, {tags} times; "
            f"{len(sample.pictures)} images are given"
        )
    pictures = [picture.image for picture in sample.pictures]
    more = {"add_special_tokens": special, **rendered.more}
    try:
        full = model.processor(text=rendered.text, images=pictures, return_tensors="pt", **more)
    except (ValueError, IndexError) as fault:
        raise BadSample(f"the model's processor cannot take it: {fault}") from fault
    return {
        name: value
        for name, value in full.items()
        if isinstance(value, Tensor) and name not in NOT_FOR_THE_MODEL
    }


def _tokenised_text(encoded: Any, content: npt.NDArray[np.bool_], model: LoadedProcessor) -> Tokenised:
    if model.image_token in encoded["input_ids"]:
        raise BadSample("the text holds the model's image token, but no image is given")
    inputs = {name: torch.tensor([encoded[name]]) for name in ("input_ids", "attention_mask")}
    return Tokenised(inputs, content, no_places(len(content)))


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


def _find_all(text: str, wanted: str) -> list[tuple[int, int]]:
    spans, at = [], text.find(wanted)
    while at >= 0:
        spans.append((at, at + len(wanted)))
        at = text.find(wanted, at + len(wanted))
    return spans


def _touching(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """(token,) whether its characters, from `offsets`, lie in one of the spans, which are in order."""
    touches, at = np.zeros(len(offsets), bool), 0
    for token, (start, end) in enumerate(offsets):
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        touches[token] = at < len(spans) and start < end and spans[at][0] < end
    return touches


def _carry_over(
    plain: npt.NDArray[np.int64],
    content: npt.NDArray[np.bool_],
    holders: npt.NDArray[np.bool_],
    ids: npt.NDArray[np.int64],
    picture: npt.NDArray[np.int16],
) -> npt.NDArray[np.bool_]:
    """Content flags for `ids`, which are `plain` with each placeholder grown into many tokens.

    Around its image tokens a processor writes names of tiles, marks, even words, which are not in `plain`:
    the text between two placeholders is laid where most of its tokens agree with those between two pictures.
    """
    flags = np.zeros(len(ids), bool)
    pictures = [np.flatnonzero(picture == nth) for nth in range(picture.max() + 1)]
    if holders.sum() != len(pictures):
        raise BadSample(f"{holders.sum()} tokens stand for images where {len(pictures)} are given")
    texts = _between([(place, place + 1) for place in np.flatnonzero(holders).tolist()], len(plain))
    gaps = _between([(int(one[0]), int(one[-1]) + 1) for one in pictures], len(ids))
    for (start, stop), (low, high) in zip(texts, gaps, strict=True):
        shift = _best_shift(plain[start:stop], ids[low:high])
        first, last = max(0, shift), min(high - low, stop - start + shift)
        if first < last:
            here, there = slice(low + first, low + last), slice(start + first - shift, start + last - shift)
            flags[here] = content[there] & (plain[there] == ids[here])
    return flags


def _best_shift(text: npt.NDArray[np.int64], room: npt.NDArray[np.int64]) -> int:
    """How far into `room` the text starts; a token at either end may have grown together with a neighbour."""

    def agreeing(shift: int) -> int:
        first, last = max(0, shift), min(len(room), len(text) + shift)
        return int((text[first - shift : last - shift] == room[first:last]).sum()) if first < last else 0

    return max(range(-2, max(0, len(room) - len(text)) + 3), key=agreeing)


def _between(runs: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    edges = [0, *(edge for run in runs for edge in run), length]
    return list(zip(edges[::2], edges[1::2], strict=True))
