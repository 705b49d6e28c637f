"""A writer's memory is what `memory` says, held by a real process."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import clt.cache_format
from clt.cache_format.int8 import SLAB
from clt.cache_format.manifest import Manifest
from clt.cache_format.window import memory

TEXT = (Path(clt.cache_format.__file__).parent / "FORMAT.md").read_text()
STATUS = Path("/proc/self/status")
THREADS = 2
FIELDS: dict[str, Any] = {
    "d_model": 1024,
    "layers": tuple(range(4)),
    "window": 4096,
    "seed": 0,
    "world_size": 1,
    "source": {},
}
WRITE = """
import gc, json, sys
from pathlib import Path
import numpy as np
from clt.cache_format import CacheWriter, Manifest

def status(name):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

fields = json.loads(sys.argv[2])
manifest = Manifest(**{**fields, "layers": tuple(fields["layers"])})
N = 64
drawn = np.random.default_rng(0).standard_normal((N, 4, 1024), np.float32)
values = {"mlp_in": drawn, "mlp_out": drawn}
columns = {c: np.zeros(N, np.int32) for c in ("sample", "position", "token_id", "kind", "row", "col")}
def fill(writer, split, windows):
    for n in range(windows * fields["window"] // N - 1):
        writer.add(split, n, {"sample": 0}, columns, values)
before = status("VmRSS")
with CacheWriter(Path(sys.argv[1]), manifest, threads=2) as writer:
    fill(writer, "val", 1)
    fill(writer, "train", 3)
    writer.finish()
print(status("VmHWM") - before)
"""


def manifest(precision: str) -> Manifest:
    return Manifest(**FIELDS, precision=precision, step_divisor=8.0 if precision == "int8" else 0.0)


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux's count of memory")
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_writer_holds_no_more_than_it_says(tmp_path: Path, precision: str) -> None:
    """Both splits fill while a window is written: the peak is below the bound, and near it."""
    options = {**FIELDS, "precision": precision, "step_divisor": 8.0 if precision == "int8" else 0.0}
    command = [sys.executable, "-c", WRITE, str(tmp_path / "c"), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bound = memory(manifest(precision), THREADS)
    assert 0.75 * bound < int(done.stdout) <= bound


@pytest.mark.parametrize(("precision", "value"), [("int8", 1), ("bf16", 2)])
def test_the_bound_is_the_sum_of_its_parts(precision: str, value: int) -> None:
    """The formula of FORMAT.md, number by number."""
    token = 4 * 2 * (1024 + 2 * 32) if precision == "int8" else 4 * 2 * 2 * 1024
    windows = 3 * 4096 * (token + 32 * 4 + 18)
    assert 24 * SLAB == 6 * 2**20
    threads = THREADS * (4 * 64 * 1024 * value + 24 * SLAB)
    assert memory(manifest(precision), THREADS) == windows + threads + 5 * 64 * 4 * 1024


def test_the_example_of_the_page() -> None:
    """FORMAT.md's figures for LLaVA-1.5-7B."""
    found = re.search(r"2 threads\): ([\d.]+) GB for int8, ([\d.]+) GB for bf16", TEXT)
    assert found
    for precision, figure in zip(("int8", "bf16"), found.groups(), strict=True):
        llava = replace(manifest(precision), d_model=4096, layers=tuple(range(32)), window=16384)
        assert f"{memory(llava, 2) / 1e9:.1f}" == figure
