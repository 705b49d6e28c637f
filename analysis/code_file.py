"""The codes of one layer on disk while its examples are chosen, which are then looked up, not recomputed.

Three plain files that only grow: codes by token (int32), latents (int32), activations (float32); 4 bytes a
token and 8 a code, of one layer at a time. Scratch, removed when the layer is done.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..train.sparse import Codes


class Block(NamedTuple):
    """Positive codes of some tokens."""

    row: npt.NDArray[np.int64]
    """(code,): place of its token among the tokens that were added"""
    latent: npt.NDArray[np.int32]
    value: npt.NDArray[np.float32]


DTYPES = {"count": np.dtype("<i4"), "latent": np.dtype("<i4"), "value": np.dtype("<f4")}


class CodeFile:
    """`tokens` and `codes` say how much of the files counts; what lies behind is cut off when it goes on."""

    def __init__(self, folder: Path, tokens: int = 0, codes: int = 0) -> None:
        self.folder, self.tokens, self.codes = folder, tokens, codes
        folder.mkdir(parents=True, exist_ok=True)
        for name, dtype in DTYPES.items():
            size = (tokens if name == "count" else codes) * dtype.itemsize
            with open(self._path(name), "ab") as file:
                if file.tell() < size:
                    raise ValueError(f"{self._path(name)} has lost bytes; remove {folder.parent.parent}")
                file.truncate(size)

    def sync(self) -> None:
        """What was added survives a crash of the machine."""
        for name in DTYPES:
            with open(self._path(name), "rb") as file:
                os.fsync(file.fileno())

    def add(self, codes: Codes) -> None:
        positive = codes.values > 0
        count = codes.where(positive).starts.diff()
        parts = {"count": count, "latent": codes.columns[positive], "value": codes.values[positive].float()}
        for name, tensor in parts.items():
            with open(self._path(name), "ab") as file:
                file.write(tensor.cpu().numpy().astype(DTYPES[name], copy=False).tobytes())
        self.tokens, self.codes = self.tokens + codes.n_tokens, self.codes + len(parts["value"])

    def blocks(self, n_tokens: int) -> Iterator[Block]:
        """All codes, those of n_tokens tokens at a time."""
        code = 0
        for first in range(0, self.tokens, n_tokens):
            count = self._read("count", first, min(n_tokens, self.tokens - first))
            size = int(count.sum())
            row = np.repeat(np.arange(first, first + len(count)), count)
            yield Block(row, self._read("latent", code, size), self._read("value", code, size))
            code += size

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def _read(self, name: str, first: int, size: int) -> npt.NDArray[Any]:
        dtype = DTYPES[name]
        return np.fromfile(self._path(name), dtype, size, offset=first * dtype.itemsize)

    def _path(self, name: str) -> Path:
        return self.folder / name
