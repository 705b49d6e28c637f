"""What a commit costs does not grow with what was committed before it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clt.cache_format.folder import Documents, extents_of
from clt.cache_format.journal import read_journal

READ = Path("/proc/self/io")
SMALL: dict[str, Any] = {"layers": (1,), "window": 64, "d_model": 8, "threads": 1}
WINDOWS = 60


def bytes_read() -> int:
    """Bytes that this process has read so far, from whatever file."""
    return int(READ.read_text().split()[1])


@pytest.mark.skipif(not READ.exists(), reason="needs Linux's count of bytes")
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_late_commit_reads_as_much_as_an_early_one(plan_cache: Callable[..., Any], world_size: int) -> None:
    """Two writers in turn: each commit reads its own new line and the other's, and the documents."""
    tiny = plan_cache(lengths=(64,) * (WINDOWS * world_size), world_size=world_size, **SMALL)
    writers = [tiny.writer(rank) for rank in range(world_size)]
    read = []
    for nth in range(WINDOWS):
        for rank, writer in enumerate(writers):
            sample = tiny.samples[nth * world_size + rank]
            writer.add("train", nth, sample.line, sample.columns, sample.values)
            before = bytes_read()
            writer.flush()
            read.append(bytes_read() - before)
    for writer in writers:
        writer.close()
    early, late = max(read[4:12]), max(read[-8:])
    line = max(map(len, (tiny.path / "journal.jsonl").read_bytes().splitlines()))
    assert late < early + line / 2


def test_what_is_followed_is_what_is_read_whole(make_cache: Callable[..., Any], tmp_path: Path) -> None:
    """However the journals grow, or are cut by a writer that takes a line back, it is as if all was read."""
    tiny = make_cache(world_size=2)
    logs = {name: (tiny.path / name).read_bytes() for name in ("journal.jsonl", "journal-00001.jsonl")}
    documents = Documents(tmp_path, tiny.manifest, 0)
    total = sum(map(len, logs.values()))
    for percent in (0, 3, 20, 50, 51, 40, 100, 10, 100):
        for name, data in logs.items():
            (tmp_path / name).write_bytes(data[: len(data) * percent // 100])
        journals = [read_journal(tmp_path, rank) for rank in (0, 1)]
        windows = [entry for journal in journals for entry in journal.windows]
        assert documents._read_on() == extents_of(tiny.manifest, windows), (percent, total)
