"""A safetensors file that is written in pieces, so that a tensor may be larger than memory.

The format: the header's length (uint64, little-endian), the header (JSON, padded with spaces to eight bytes),
then the tensors, row by row, one after the other. What is never written reads as zeros, and is a hole that
takes no room on the disk.
"""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Slot(NamedTuple):
    """Where a tensor lies."""

    dtype: torch.dtype
    start: int
    """Byte in the file"""


class TensorFile:
    """Give all names, dtypes and sizes first; then `write` any part of them, in any order."""

    def __init__(self, path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        header, starts, end = {}, {}, 0
        for name, (dtype, size) in tensors.items():
            starts[name], end = end, end + math.prod(size) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(size), "data_offsets": [starts[name], end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        self._slots = {name: Slot(tensors[name][0], base + start) for name, start in starts.items()}
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.pwrite(self._file, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(self._file, base + end)

    def write(self, name: str, values: Tensor, first: int = 0) -> None:
        """Put values, row by row, into the tensor from its element `first` on."""
        slot = self._slots[name]
        flat = values.detach().to(slot.dtype).cpu().contiguous().view(-1)
        data = flat.view(torch.uint8).numpy().data
        place = slot.start + first * slot.dtype.itemsize
        while data:  # the kernel writes 2 GiB at most at a time
            done = os.pwrite(self._file, data, place)
            data, place = data[done:], place + done

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A file of tensors that fit in memory."""
    with TensorFile(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
