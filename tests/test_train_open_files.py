"""A cache of more shards than a process may open files: read whole, by several readers at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numbered import write_cache

WINDOWS = 60
READ = """
import json, os, resource, sys
from contextlib import ExitStack
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from numbered import numbers
from clt.train.reader import Reader
from clt.train.source import Source

limit, io, caches = int(sys.argv[2]), sys.argv[3], [Path(path) for path in sys.argv[4:]]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
sources = [Source(caches, split, io=io) for split in ("train", "val")]
read, files = [], 0
with ExitStack() as stack:
    readers = [stack.enter_context(Reader(s, buffer_tokens=1024, seed=0, threads=6)) for s in sources]
    for source, reader in zip(sources, readers):
        read.append(sorted(numbers(reader.next(source.n_tokens)).tolist()))
        files = max(files, len(os.listdir("/proc/self/fd")))
print(json.dumps([read, files]))
"""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three, each of 60 windows of train, which are one chunk each, and some of val."""
    root = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        first = write_cache(root / "0", 64 * WINDOWS, 64, val=64 * 5)
    return [first, *(shutil.copytree(first, root / str(n)) for n in (1, 2))]


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize("limit", [64, 300])
def test_few_files_are_enough(caches: list[Path], io: str, limit: int) -> None:
    """Two readers at a time, each with buffers of 16 windows and more shards than files."""
    code = [sys.executable, "-c", READ, str(Path(__file__).parent), str(limit), io, *map(str, caches)]
    done = subprocess.run(code, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    read, files = json.loads(done.stdout)
    assert read == [sorted([*range(64 * n)] * 3) for n in (WINDOWS, 5)]
    assert files < limit
