"""What reading costs in memory: the stated bound holds in a process that may not take more."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clt.cache_format import CacheWriter, Manifest

WIDTH, LAYERS, WINDOW, WINDOWS = 1024, 4, 4096, 4

LIMITED = """
import json, os, re, resource, sys, threading
from pathlib import Path
import numpy, torch
from clt.train.reader import Reader
from clt.train.read_ahead import FETCHERS
from clt.train.source import Source

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

threads = 3
threading.stack_size(1 << 18)  # a stack is address space that counts against the limit, used or not
stacks = (2 * threads + 1 + FETCHERS) * (1 << 18)
path, io, share = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
data, resident = status("VmData"), status("RssAnon")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
source = Source([path], "train", io=io)
with Reader(source, buffer_tokens=4096, seed=0, threads=threads) as reader:
    bound = reader.memory_bytes(2048)
    resource.setrlimit(resource.RLIMIT_DATA, (int(data + stacks + share * bound),) * 2)
    batch = None
    for _ in range(16):
        batch = None
        batch = reader.next(2048)
print(json.dumps({"bound": bound, "peak": status("VmHWM") - resident - status("RssFile")}))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "c"
    manifest = Manifest(
        d_model=WIDTH,
        layers=tuple(range(LAYERS)),
        precision="int8",
        step_divisor=8.0,
        window=WINDOW,
        seed=0,
        world_size=1,
        source={"model": "wide"},
    )
    some = np.random.default_rng(0).standard_normal((WINDOW, LAYERS, WIDTH), np.float32)
    columns = {name: np.zeros(WINDOW, int) for name in ("position", "token_id", "kind", "row", "col")}
    with CacheWriter(path, manifest) as writer:
        for number in range(WINDOWS):
            sample = {"sample": np.full(WINDOW, number)}
            values = {"mlp_in": some, "mlp_out": some}
            writer.add("train", number, {"sample": number, "id": str(number)}, columns | sample, values)
        writer.finish()
    return path


def limited(cache: Path, io: str, share: float) -> subprocess.CompletedProcess[str]:
    """Two epochs in a process whose data (anonymous memory) may grow by this share of the bound."""
    code = [sys.executable, "-c", LIMITED, str(cache), io, str(share)]
    environment = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    return subprocess.run(code, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_reading_stays_within_the_stated_memory(cache: Path, io: str) -> None:
    """Two buffers of 32 MiB and a batch of 16: enough by the stated bound, for the limit and for the peak."""
    done = limited(cache, io, 1.0)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0.7 * found["bound"] < found["peak"] <= found["bound"]


def test_the_bound_is_no_larger_than_it_must_be(cache: Path) -> None:
    """With less than the buffers and the batch need, the same process fails: the limit does bind."""
    done = limited(cache, "pread", 0.75)
    assert done.returncode != 0
    assert "MemoryError" in done.stderr or "Unable to allocate" in done.stderr
