"""Held-out samples as the model reads them, by the harvest's own rules."""

from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..harvest.config import HarvestConfig
from ..harvest.feed import Feed
from ..harvest.model import LoadedModel
from ..harvest.rows import Rows
from ..harvest.tokens import SEQUENCE_INPUTS, TEXT, PreparedSample


class Answer(NamedTuple):
    """The end of a sample, to be generated from what stands before it."""

    inputs: dict[str, Tensor]
    """Of the prompt, batch axis of 1"""
    truth: list[int]
    """Token ids of the answer that the dataset gives"""


def held_out(rows: Rows, model: LoadedModel, config: HarvestConfig, most: int) -> Iterator[PreparedSample]:
    """The first `most` samples that the harvest put, or would put, into split val; bad ones are left out."""
    found = 0
    with closing(Feed(rows, model, config, {"train": 0, "val": 0}).reads()) as reads:
        for read in reads:
            if read.prepared is None or read.split != "val" or read.prepared.length < 2:
                continue
            yield read.prepared
            found += 1
            if found == most:
                return


def last_answer(sample: PreparedSample) -> Answer:
    """The last run of text tokens; of plain text, its second half."""
    kind: npt.NDArray[np.uint8] = sample.columns["kind"]
    ids = sample.columns["token_id"]
    text = np.flatnonzero(kind == TEXT)
    breaks = np.flatnonzero(np.diff(text) > 1)
    if len(breaks):
        start, end = int(text[breaks[-1] + 1]), int(text[-1]) + 1
    else:
        start, end = len(ids) // 2, len(ids)
    cut = {n: v[:, :start] if n in SEQUENCE_INPUTS else v for n, v in sample.inputs.items()}
    return Answer(cut, ids[start:end].tolist())
