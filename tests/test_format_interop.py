"""Other people's readers, without our code, give our numbers."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import zarr

from clt.cache_format import open_cache
from clt.cache_format.layout import BLOCK, BLOCKS, SITES, TOKEN_COLUMNS

Read = Callable[[str], npt.NDArray[Any]]


def with_zarr(path: Any) -> Read:
    group = zarr.open_group(path, mode="r")
    return lambda name: np.asarray(group[name][...])


def with_tensorstore(path: Any) -> Read:
    def read(name: str) -> npt.NDArray[Any]:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{name}/"}}
        return np.asarray(tensorstore.open(spec, read=True).result().read().result())

    return read


READERS = pytest.mark.parametrize("reader", [with_zarr, with_tensorstore])
WIDTHS = pytest.mark.parametrize("d_model", [80, 320])
"""Frames of the library, and ours."""


@READERS
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("block", BLOCKS)
@WIDTHS
def test_int8_is_codes_times_scale(
    make_cache: Callable[..., Any], reader: Any, split: str, block: int, d_model: int
) -> None:
    """codes * the scale of their block of channels, in full and partial windows and the narrow last block."""
    tiny = make_cache(block=block, d_model=d_model)
    read, ours = reader(tiny.path), open_cache(tiny.path)[split]
    for site in SITES:
        codes, scale = read(f"{split}/{site}"), read(f"{split}/{site}_scale")
        assert codes.dtype == np.int8
        assert scale.dtype == np.float16
        values = codes * np.repeat(scale.astype(np.float32), block, axis=2)[..., : codes.shape[2]]
        np.testing.assert_array_equal(values, ours.read(site))


@READERS
@pytest.mark.parametrize("split", ["train", "val"])
@WIDTHS
def test_bf16_is_the_upper_half_of_float32(
    make_cache: Callable[..., Any], reader: Any, split: str, d_model: int
) -> None:
    """uint16 bits shifted into place, negative values and all."""
    tiny = make_cache(precision="bf16", d_model=d_model)
    read, ours = reader(tiny.path), open_cache(tiny.path)[split]
    for site in SITES:
        bits = read(f"{split}/{site}")
        assert bits.dtype == np.uint16
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        assert (values < 0).any()
        np.testing.assert_array_equal(values, ours.read(site))


@READERS
def test_the_token_table_is_plain_columns(make_cache: Callable[..., Any], reader: Any) -> None:
    """Each column has one entry a token, in the order of the activations."""
    tiny = make_cache()
    read, ours = reader(tiny.path), open_cache(tiny.path)["train"]
    for name, dtype in TOKEN_COLUMNS.items():
        column = read(f"train/token/{name}")
        assert column.dtype == dtype
        np.testing.assert_array_equal(column, ours.token_column(name))


@READERS
def test_statistics_are_readable(make_cache: Callable[..., Any], reader: Any) -> None:
    """The last window's sums are the split's."""
    tiny = make_cache()
    read, ours = reader(tiny.path), open_cache(tiny.path)["train"]
    sums, count = ours.sums
    np.testing.assert_array_equal(read("stats/train/count")[-1], count)
    np.testing.assert_array_equal(read("stats/train/mlp_in/sum")[-1], sums["mlp_in"].sum)
    np.testing.assert_array_equal(read("stats/train/mlp_out/absmax")[-1], sums["mlp_out"].absmax)


@READERS
def test_a_cache_that_is_being_written_is_readable(plan_cache: Callable[..., Any], reader: Any) -> None:
    """The documents follow the journal, so that what is committed can be read before the harvest ends."""
    tiny = plan_cache()
    with tiny.writer() as writer:
        tiny.feed(writer)
    read, ours = reader(tiny.path), open_cache(tiny.path)["train"]
    assert len(ours) == 256
    np.testing.assert_array_equal(read("train/token/sample"), ours.token_column("sample"))
    codes, scale = read("train/mlp_in"), read("train/mlp_in_scale").astype(np.float32)
    np.testing.assert_array_equal(codes * np.repeat(scale, BLOCK, axis=2)[..., :80], ours.read("mlp_in"))


def test_zarr_walks_the_whole_tree(make_cache: Callable[..., Any]) -> None:
    """Every group and array is known to zarr-python, and it wonders at nothing but our three logs."""
    tiny = make_cache()
    with warnings.catch_warnings(record=True) as wondered:
        warnings.simplefilter("always")
        group = zarr.open_group(tiny.path, mode="r")
        members = dict(group.members(max_depth=None))
    logs = {"journal.jsonl", "rejected.jsonl", "samples.jsonl"}
    assert {str(warning.message).split()[2] for warning in wondered} == logs
    assert {"train/mlp_in", "val/token/kind", "stats/train/mlp_out/noise"} <= members.keys()
    documents = {name.removesuffix("/zarr.json") for name in tiny.files() if name.endswith("/zarr.json")}
    assert members.keys() == documents
    assert group.attrs["clt"]["format_version"] == 1
