"""The C library's heap, for work that frees large blocks and asks for as large ones at once."""

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""glibc's names for them in malloc.h"""
LARGEST = 32 << 20
"""Bytes; glibc takes no larger threshold."""


def keep_freed_memory() -> None:
    """From now on blocks up to LARGEST are reused, and what is freed stays with the process.

    By default glibc may give each large block back to the kernel, and every page of the next one costs a
    fault: some tenth of a forward pass on a CPU (`benchmarks/bench_harvest.py`). The process holds on to
    the most that it used at a time. Without glibc nothing happens.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, LARGEST)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
