"""Freed memory is used again, where the C library can be told so."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import clt.heap
if sys.argv[1] == "kept":
    clt.heap.keep_freed_memory()
def faults():
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * (20 << 20) for _ in range(5)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began
faults()
print(faults() + faults())
"""


def faults(how: str) -> int:
    """Pages that two rounds of the same large blocks fault in, after a first one."""
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_blocks_are_reused() -> None:
    """100 MB are 25,600 pages; a few may come from elsewhere."""
    assert faults("kept") < 1000 < faults("as it is")
