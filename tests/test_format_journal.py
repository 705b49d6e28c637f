"""The journal: whole lines count, torn ones do not, altered ones are found."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clt.cache_format import CacheError, DamagedCacheError, Manifest, open_cache
from clt.cache_format.files import checksum
from clt.cache_format.journal import (
    FileEntry,
    LogSizes,
    WindowEntry,
    append,
    check_windows,
    final_line,
    header_line,
    read_journal,
    window_line,
)
from clt.cache_format.layout import window_files

MANIFEST = Manifest(
    d_model=8, layers=(0,), precision="bf16", step_divisor=0.0, window=64, seed=0, world_size=2, source={}
)
FILE = FileEntry(10, "00000000")
LOGS = LogSizes(FileEntry(7, "01234567"), FILE)
IN_ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


def entry(split: str = "train", window: int = 0, tokens: int = 64, **changed: Any) -> WindowEntry:
    files = dict.fromkeys(window_files(split, window, 1, False), FILE)
    fields = {"split": split, "window": window, "tokens": tokens, "files": files}
    return WindowEntry(**{**fields, "logs": LOGS, "cursor": 5, "skip": 3, **changed})


def signed(content: str) -> bytes:
    """A line with a right checksum around any content; `content` lacks its closing brace."""
    return f'{content},"crc32c":"{checksum(content.encode())}"}}\n'.encode()


def put(folder: Path, *lines: bytes) -> Path:
    path = folder / "journal.jsonl"
    path.write_bytes(b"".join(lines))
    return path


HEADER = header_line(MANIFEST.canonical())
LINES = (HEADER, window_line(entry()), window_line(entry("val", tokens=9)), final_line(LOGS))


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    """Header, windows and end come back as they were."""
    put(tmp_path, *LINES)
    journal = read_journal(tmp_path, 0)
    assert journal.manifest_crc32c == checksum(MANIFEST.canonical().encode())
    assert journal.windows == [entry(), entry("val", tokens=9)]
    assert journal.complete
    assert journal.logs == LOGS
    assert journal.torn_bytes == 0
    assert journal.valid_bytes == sum(map(len, LINES))


def test_a_missing_journal_is_empty(tmp_path: Path) -> None:
    """A writer that has not begun has committed nothing."""
    journal = read_journal(tmp_path, 3)
    assert journal.windows == []
    assert not journal.complete
    assert journal.logs.samples == FileEntry(0, checksum(b""))


def test_any_cut_leaves_the_whole_lines(tmp_path: Path) -> None:
    """Cut after any byte, the journal holds the lines that are whole and counts the torn bytes."""
    data, ends = b"".join(LINES), [sum(map(len, LINES[:n])) for n in range(len(LINES) + 1)]
    for cut in {*ends[:-1], *range(0, len(data), 9)}:
        put(tmp_path, data[:cut])
        journal = read_journal(tmp_path, 0)
        whole = max(end for end in ends if end <= cut)
        assert (journal.valid_bytes, journal.torn_bytes) == (whole, cut - whole)
        assert len(journal.windows) == sum(ends[n] <= cut for n in (2, 3))
        assert not journal.complete


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """One flipped bit raises, naming file and line, or shows as a torn last line."""
    data = b"".join(LINES)
    for bit in range(0, 8 * len(data), 37):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        put(tmp_path, bytes(altered))
        try:
            journal = read_journal(tmp_path, 0)
        except DamagedCacheError as fault:
            assert "journal.jsonl, line" in str(fault)  # noqa: PT017 - either is right
        else:
            assert journal.torn_bytes
            assert not journal.complete


@pytest.mark.parametrize(
    "name",
    [
        "../etc/passwd",
        "/etc/passwd",
        "train/../../x/c.0.0.0",
        "train/./c.0",
        "train//c.0",
        "other/mlp_in/c.0.0.0",
        "train/mlp_in/zarr.json",
        "train\\\\mlp_in/c.0",
        "train/mlp_in/c.0\\u0000",
        "train/mlp_in/c.\\u0661",
        "train/mlp_in/c.0\\n",
        "",
    ],
)
def test_a_path_that_is_no_file_of_a_cache_is_refused(tmp_path: Path, name: str) -> None:
    """Nothing outside the folder, or beside its chunks, can be named."""
    text = window_line(entry(files={"train/mlp_in/c.0": FILE})).decode().replace("train/mlp_in/c.0", name)
    put(tmp_path, HEADER, signed(text.rpartition(',"crc32c"')[0]))
    with pytest.raises(DamagedCacheError, match=r"line 2: files: .* is no file of a cache"):
        read_journal(tmp_path, 0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("split", '"test"', "split: expected one of"),
        ("window", "-1", "window: expected an integer from 0"),
        ("window", "1e3", "window: expected an integer"),
        ("tokens", "0", "tokens: expected an integer from 1"),
        ("tokens", "99999999999", "tokens: expected an integer"),
        ("cursor", "-5", "cursor: expected an integer from 0"),
        ("skip", "null", "skip: expected an integer"),
        ("files", "[]", "files: expected an object"),
        ("files", '{"train/mlp_in/c.0":[1]}', r"expected \[bytes, crc32c\]"),
        ("files", '{"train/mlp_in/c.0":[-1,"0"]}', "expected an integer from 0"),
        ("samples", "7", r"samples: expected \[bytes, crc32c\]"),
        ("files", "[" * 100_000, "nested too deep"),
        ("tokens", '1,"tokens":2', "expected each key once, found 'tokens' twice"),
    ],
)
def test_each_bad_field_of_a_strangers_line_is_named(
    tmp_path: Path, field: str, value: str, message: str
) -> None:
    """A right checksum does not make a wrong line right."""
    fields = json.loads(window_line(entry()))
    del fields["crc32c"]
    pairs = [f'"{k}":{value if k == field else json.dumps(v)}' for k, v in fields.items()]
    put(tmp_path, HEADER, signed("{" + ",".join(pairs)))
    with pytest.raises(DamagedCacheError, match=message) as caught:
        read_journal(tmp_path, 0)
    assert "journal.jsonl, line 2: " in str(caught.value)


def test_nothing_follows_the_end(tmp_path: Path) -> None:
    """A window after the line that ends the journal is refused."""
    put(tmp_path, HEADER, final_line(LOGS), window_line(entry()))
    with pytest.raises(DamagedCacheError, match="line 3: expected nothing after"):
        read_journal(tmp_path, 0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(window=1)], "window 1 of train: expected window 0"),
        ([entry(), entry()], "expected window 2"),
        ([entry(), entry(window=4)], "expected window 2"),
        ([entry(tokens=65)], "expected 64 tokens, found 65"),
        ([entry(tokens=9), entry(window=2)], "expected 64 tokens, found 9"),
        ([entry(files={})], "files are missing from its list"),
        ([entry(files=entry("val").files)], "do not belong there"),
    ],
)
def test_windows_out_of_place_are_refused(tmp_path: Path, entries: list[WindowEntry], message: str) -> None:
    """Windows of a rank are numbered by the world size, full but for the last, and list their own files."""
    put(tmp_path, HEADER, *map(window_line, entries))
    with pytest.raises(DamagedCacheError, match=message):
        check_windows(read_journal(tmp_path, 0), 0, MANIFEST)


def test_windows_in_place_are_accepted(tmp_path: Path) -> None:
    """Rank 1 of 2 writes windows 1, 3, 5; splits are numbered apart."""
    lines = [entry(window=1), entry("val", 1, 3), entry(window=3), entry(window=5, tokens=1)]
    (tmp_path / "journal-00001.jsonl").write_bytes(HEADER + b"".join(map(window_line, lines)))
    check_windows(read_journal(tmp_path, 1), 1, MANIFEST)


@IN_ONE_FOLDER
@given(st.lists(st.binary(max_size=80) | st.sampled_from(LINES), max_size=5).map(b"".join))
def test_any_bytes_are_a_journal_or_a_cache_error(tmp_path: Path, data: bytes) -> None:
    """No file content gives another exception."""
    put(tmp_path, data)
    try:
        journal = read_journal(tmp_path, 0)
        check_windows(journal, 0, MANIFEST)
    except CacheError:
        return
    assert journal.valid_bytes + journal.torn_bytes == len(data)


@IN_ONE_FOLDER
@given(st.text(alphabet='{}[]",:0123456789aeltrusinfw/.-\\', max_size=80))
def test_any_signed_line_is_a_window_or_a_cache_error(tmp_path: Path, text: str) -> None:
    """A stranger can sign what he likes; the parser holds."""
    put(tmp_path, HEADER, signed(text))
    try:
        read_journal(tmp_path, 0)
    except CacheError as fault:
        assert "line 2" in str(fault)  # noqa: PT017 - both outcomes are right


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes three bytes at a time still gets the whole line."""
    real, path = os.write, tmp_path / "journal.jsonl"
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    append(descriptor, HEADER)
    os.close(descriptor)
    assert path.read_bytes() == HEADER


def test_the_journal_must_name_the_manifest(make_cache: Callable[..., Any]) -> None:
    """A manifest that was exchanged under a journal is found at open."""
    one, other = make_cache("one", lengths=(9,)), make_cache("other", lengths=(9,), seed=8)
    (one.path / "zarr.json").write_bytes((other.path / "zarr.json").read_bytes())
    with pytest.raises(DamagedCacheError, match=r"not the one that .*journal\.jsonl names"):
        open_cache(one.path)
