"""Names and places: the arithmetic that every reader repeats."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt.cache_format import CacheError, layout, open_cache


@given(st.integers(0, 10**7))
def test_chunks_hold_all_tokens_and_no_more(tokens: int) -> None:
    """n chunks are enough and n - 1 are not."""
    n = layout.n_chunks(tokens)
    assert (n - 1) * layout.CHUNK < tokens <= n * layout.CHUNK or tokens == n == 0


@given(st.integers(1, 10**6))
def test_blocks_hold_all_channels_and_no_more(d_model: int) -> None:
    """The last block is between 1 and a block's channels wide; the number of scales tells the block."""
    for block in layout.BLOCKS:
        scales = layout.n_blocks(d_model, block)
        assert 1 <= d_model - (scales - 1) * block <= block
        assert layout.block_of(d_model, scales) == block or scales == 1


def test_names_never_change() -> None:
    """Zarr's default chunk keys with a dot, by split, site and layer place."""
    assert layout.shard_file(layout.values_array("train", "mlp_in"), 12, 3) == "train/mlp_in/c.12.3.0"
    assert layout.shard_file(layout.scale_array("val", "mlp_out"), 0, 0) == "val/mlp_out_scale/c.0.0.0"
    assert layout.window_file(layout.token_array("val", "kind"), 7, 1) == "val/token/kind/c.7"
    assert layout.window_file(layout.count_array("train"), 2, 2) == "stats/train/count/c.2.0"
    assert layout.log_name(layout.JOURNAL, 0) == "journal.jsonl"
    assert layout.log_name(layout.SAMPLES, 3) == "samples-00003.jsonl"


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_window_files_are_those_that_are_written(make_cache: Callable[..., Any], precision: str) -> None:
    """The list that the journal is checked against is what a writer produces, each name once."""
    tiny = make_cache(precision=precision)
    expected = []
    for split, windows in (("train", 3), ("val", 2)):
        for window in range(windows):
            expected += layout.window_files(split, window, 3, precision == "int8")
    assert len(expected) == len(set(expected))
    assert {name for name in tiny.files() if "/c." in name} == set(expected)
    assert len(open_cache(tiny.path)["train"].entries) == 3


HELD = (0, 1, 2, 5, 9)


@pytest.mark.parametrize(
    ("text", "layers"),
    [(None, HELD), ("0-2", (0, 1, 2)), ("9,0,0", (0, 9)), ("1-9:4", (1, 5, 9)), ("5", (5,))],
)
def test_layers_are_parsed(text: str | None, layers: tuple[int, ...]) -> None:
    """A range includes its end; order and repetition do not matter."""
    assert layout.parse_layers(text, HELD) == layers


@pytest.mark.parametrize(
    "text", ["", "a", "0-", "-1", "3", "0-9", "2-0", "0-2:0", "1.5", "0-9:x", "0-999999999999"]
)
def test_layers_that_are_not_held_or_not_readable_are_refused(text: str) -> None:
    """The message repeats what was typed."""
    with pytest.raises(CacheError, match="--layers: expected"):
        layout.parse_layers(text, HELD)
