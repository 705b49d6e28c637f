"""Metadata that a stranger wrote: an error that says what is wrong, and no memory to speak of."""

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clt.cache_format import CacheError, CacheWriter, open_cache, verify_cache
from clt.cache_format.files import checksum
from clt.cache_format.journal import FileEntry, header_line, window_line
from clt.cache_format.stored import read_array

MOST = 4 << 20
"""Bytes that refusing may take."""


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


@pytest.fixture
def tiny(make_cache: Callable[..., Any]) -> Any:
    return make_cache(lengths=(9, 9, 9), layers=(0,), window=64)


def put_root(folder: Path, text: str | bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "zarr.json").write_bytes(text.encode() if isinstance(text, str) else text)


def document(manifest: str) -> str:
    return f'{{"zarr_format":3,"node_type":"group","attributes":{{"clt":{manifest}}}}}'


def with_field(tiny: Any, name: str, value: str) -> str:
    fields = {**tiny.manifest.to_json(), name: 0}
    return document(
        "{" + ",".join(f'"{k}":{value if k == name else json.dumps(v)}' for k, v in fields.items()) + "}"
    )


HUGE = "1" + "0" * 400
BAD_FIELDS = [
    ("d_model", "1048576000000"),
    ("d_model", HUGE),
    ("d_model", "-80"),
    ("layers", "[" + ",".join(map(str, range(20_000))) + "]"),
    ("layers", "[-1]"),
    ("layers", "[" * 5000),
    ("window", "9223372036854775807"),
    ("window", "-64"),
    ("world_size", "1000000000"),
    ("seed", "-1"),
    ("seed", "1e3"),
    ("step_divisor", "1e999"),
    ("step_divisor", HUGE),
    ("step_divisor", "NaN"),
    ("precision", '"pickle"'),
    ("precision", '{"name":"pickle"}'),
    ("source", '{"a":' * 5000),
    ("source", '{"a":{"__class__":"os.system"}}'),
    ("codecs", '[{"name":"pickle"}]'),
    ("format_version", '"1; import os"'),
    ("d_model", '80,"d_model":80'),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=lambda text: text[:24])
def test_a_strangers_manifest_is_refused_cheaply(tiny: Any, name: str, value: str) -> None:
    """Huge shapes, negative counts, unknown codecs, bottomless nesting, repeated keys."""
    put_root(tiny.path, with_field(tiny, name, value))
    for refuse in (lambda: open_cache(tiny.path), lambda: CacheWriter(tiny.path, tiny.manifest)):
        with little_memory(), pytest.raises(CacheError) as caught:
            refuse()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    assert len(verify_cache(str(tiny.path), full=True)) == 1


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"[" * 200_000,
        b'{"attributes":' * 50_000,
        b'{"attributes":{"clt":0}}',
    ],
    ids=lambda text: text[:16].hex(),
)
def test_a_root_that_is_no_document_is_refused(tmp_path: Path, text: bytes) -> None:
    """Whatever lies in zarr.json."""
    put_root(tmp_path / "c", text)
    with little_memory(), pytest.raises(CacheError, match=r"zarr\.json"):
        open_cache(tmp_path / "c")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=100) | st.text(alphabet='{}[]",:attributescl0189.-eE\\', max_size=100).map(str.encode)
)
def test_any_root_is_a_cache_error(tmp_path: Path, data: bytes) -> None:
    """No bytes give another exception."""
    put_root(tmp_path / "c", data)
    with pytest.raises(CacheError):
        open_cache(tmp_path / "c")


def forge_journal(tiny: Any, **changed: Any) -> None:
    """Sign a journal whose first window says something else."""
    entry = open_cache(tiny.path)["train"].entries[0]
    entry = type(entry)(**{**entry.__dict__, **changed})
    lines = [header_line(tiny.manifest.canonical()), window_line(entry)]
    (tiny.path / "journal.jsonl").write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": 2**20},
        {"tokens": 2**62},
        {"tokens": -1},
        {"window": 2**40},
        {"files": {}},
        {"files": {"../../etc/passwd": FileEntry(1, "0")}},
        {"cursor": -1},
    ],
    ids=str,
)
def test_a_strangers_journal_is_refused_cheaply(tiny: Any, changed: dict[str, Any]) -> None:
    """More tokens than a window, windows without files, files outside: refused at open, and not resumed."""
    forge_journal(tiny, **changed)
    for refuse in (lambda: open_cache(tiny.path, check=False), tiny.writer):
        with little_memory(), pytest.raises(CacheError, match=r"journal\.jsonl"):
            refuse()


def test_sizes_that_the_files_do_not_have_are_refused(tiny: Any) -> None:
    """A signed journal cannot make files larger than they are."""
    entry = open_cache(tiny.path)["train"].entries[0]
    forge_journal(tiny, files={name: FileEntry(2**49, file.crc32c) for name, file in entry.files.items()})
    with little_memory(), pytest.raises(CacheError, match="faulty files"):
        open_cache(tiny.path)


@pytest.mark.parametrize(
    "lines",
    [b"[]\n", b"7\n", b'{"sample":"1"}\n', b'{"sample":true}\n', b"{}\n", b"[" * 90_000 + b"\n", b"\xff\n"],
)
def test_a_strangers_log_is_refused(tiny: Any, lines: bytes) -> None:
    """samples.jsonl with a right checksum and wrong lines: a CacheError for reader, verify and writer."""
    (tiny.path / "samples.jsonl").write_bytes(lines)
    entry = open_cache(tiny.path)["train"].entries[0]
    logs = entry.logs._replace(samples=FileEntry(len(lines), checksum(lines)))
    forge_journal(tiny, logs=logs)
    for refuse in (lambda: open_cache(tiny.path).samples(), tiny.writer):
        with pytest.raises(CacheError, match=r"samples\.jsonl, line 1"):
            refuse()
    assert any("samples.jsonl, line 1" in fault for fault in verify_cache(str(tiny.path)))


def test_a_small_file_cannot_stand_for_a_large_array(tmp_path: Path) -> None:
    """Nothing is allocated that the bytes on disk cannot hold."""
    (tmp_path / "c.0").write_bytes(b"\x28\xb5\x2f\xfd" + b"\0" * 20)
    with little_memory(), pytest.raises(CacheError, match="24 bytes cannot hold"):
        read_array(tmp_path, "c.0", (8, 1 << 20, 1 << 20), np.dtype("<f8"))
