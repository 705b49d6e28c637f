"""The manifest: what is written comes back, what is wrong is named."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt.cache_format import CacheError, Manifest
from clt.cache_format.manifest import MAX_VALUES, parse_manifest
from clt.cache_format.strict_json import parse_json

GOOD: dict[str, Any] = {
    "d_model": 80,
    "layers": (0, 2, 5),
    "precision": "int8",
    "step_divisor": 8.0,
    "window": 128,
    "seed": 7,
    "world_size": 1,
    "source": {"model": "tiny", "tokens": None, "fraction": 0.01, "flag": True},
}
SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def parsed(**changed: Any) -> Manifest:
    return parse_manifest({**Manifest(**GOOD).to_json(), **changed})


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    precision = draw(st.sampled_from(["int8", "bf16"]))
    divisor = draw(st.floats(1, 64)) if precision == "int8" else 0.0
    layers = draw(st.sets(st.integers(0, 200), min_size=1, max_size=8))
    return Manifest(
        d_model=draw(st.integers(1, 20_000)),
        layers=tuple(sorted(layers)),
        precision=precision,
        step_divisor=divisor,
        window=64 * draw(st.integers(1, 1000)),
        block=draw(st.sampled_from([32, 64])),
        seed=draw(st.integers(0, 2**63 - 1)),
        world_size=draw(st.integers(1, 4096)),
        source=draw(st.dictionaries(st.text(max_size=8), SCALAR, max_size=4)),
    )


@given(manifests())
def test_what_is_written_comes_back(manifest: Manifest) -> None:
    """Through JSON and back a manifest is equal, has the same canonical text and no differences."""
    back = parse_manifest(parse_json(json.dumps(manifest.to_json()).encode()))
    assert back == manifest
    assert back.canonical() == manifest.canonical()
    assert manifest.differences(back) == []


@pytest.mark.parametrize(
    ("field", "bad", "message"),
    [
        ("d_model", 0, "d_model: expected an integer from 1"),
        ("d_model", True, "d_model: expected an integer"),
        ("d_model", 80.0, "d_model: expected an integer"),
        ("d_model", 2**21, "d_model: expected an integer"),
        ("layers", [], "layers: expected ascending"),
        ("layers", [2, 0], "layers: expected ascending"),
        ("layers", [1, 1], "layers: expected ascending"),
        ("layers", [-1], "layers: expected an integer from 0"),
        ("layers", "0,1", "layers: expected a list"),
        ("layers", list(range(5000)), "layers: expected a list of at most 4096 layer numbers"),
        ("precision", "fp8", "precision: expected one of"),
        ("precision", None, "precision: expected a string"),
        ("step_divisor", 0.5, "step divisor: expected 1 to 64, found 0.5"),
        ("step_divisor", float("nan"), "step_divisor: expected a number from 0 to 64"),
        ("step_divisor", 10**400, "step_divisor: expected a number"),
        ("step_divisor", "8", "step_divisor: expected a number"),
        ("window", 100, "window: expected a multiple of 64, found 100"),
        ("window", 0, "window: expected an integer from 64"),
        ("window", 2**40, "window: expected an integer"),
        ("seed", -1, "seed: expected an integer from 0"),
        ("world_size", 0, "world_size: expected an integer from 1"),
        ("world_size", 10**6, "world_size: expected an integer"),
        ("source", [], "source: expected an object"),
        ("source", {"model": ["a"]}, "source.model: expected a string or a number"),
        ("source", {"x": float("inf")}, "source.x: expected a string or a number, found inf"),
        ("block", 16, r"block: expected one of \(32, 64\), found 16"),
        ("block", True, r"block: expected one of \(32, 64\), found True"),
        ("chunk", None, "chunk: format 1 has 64, found None"),
        ("extra", 1, r"expected no other fields, found \['extra'\]"),
    ],
)
def test_each_bad_field_is_named(field: str, bad: object, message: str) -> None:
    """One short line says the field, what it must be and what it is."""
    with pytest.raises(CacheError, match=message) as caught:
        parsed(**{field: bad})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("field", sorted(GOOD.keys() | {"block", "chunk"}))
def test_each_field_is_required(field: str) -> None:
    """A manifest without one of its fields is refused."""
    data = Manifest(**GOOD).to_json()
    del data[field]
    with pytest.raises(CacheError, match=field):
        parse_manifest(data)


@pytest.mark.parametrize("version", [0, 2, "1", True, 1.0, None, [1]])
def test_another_version_is_refused(version: object) -> None:
    """A cache of another format is not guessed at, and the message says what to do."""
    message = r"reads cache format 1, the cache has .*; read it with the clt that wrote it"
    with pytest.raises(CacheError, match=message):
        parsed(format_version=version)


@pytest.mark.parametrize("data", [None, [], "clt", 1])
def test_what_is_no_object_is_no_manifest(data: object) -> None:
    """JSON of another type is refused."""
    with pytest.raises(CacheError, match="manifest: expected an object"):
        parse_manifest(data)


@given(st.dictionaries(st.sampled_from(sorted([*GOOD, "block", "chunk", "format_version", "x"])), JSON))
def test_any_object_is_a_manifest_or_a_cache_error(changed: dict[str, Any]) -> None:
    """No value in any field gives another exception, and what is accepted can be written again."""
    try:
        manifest = parsed(**changed)
    except CacheError:
        return
    assert parse_manifest(json.loads(manifest.canonical())) == manifest


def test_many_layers_of_many_channels_are_refused() -> None:
    """Each may be large, but not both: a token has at most MAX_VALUES values at a site."""
    assert parsed(layers=[*range(16)], d_model=2**20).n_layers == 16
    with pytest.raises(CacheError, match=f"at most {MAX_VALUES} values a token, found 17 layers of 1048576"):
        parsed(layers=[*range(17)], d_model=2**20)


def test_what_cannot_be_read_back_cannot_be_made() -> None:
    """The constructor holds the same line as the parser."""
    with pytest.raises(CacheError, match="d_model"):
        Manifest(**{**GOOD, "d_model": 0})
    with pytest.raises(CacheError, match="seed"):
        Manifest(**{**GOOD, "seed": -1})


def test_differences_name_fields_of_both_levels() -> None:
    """Top-level and source fields, with both values, in one order."""
    mine = Manifest(**GOOD)
    other = Manifest(**{**GOOD, "seed": 8, "source": {"model": "b", "tokens": None, "flag": True}})
    assert mine.differences(other) == ["fraction: 0.01 -> None", "model: 'tiny' -> 'b'", "seed: 7 -> 8"]


def test_sizes_follow_from_the_fields() -> None:
    """Bytes of a token: codes and float16 scales of both sites and all layers; 2 bytes a value in bf16."""
    int8, bf16 = Manifest(**GOOD), Manifest(**{**GOOD, "precision": "bf16", "step_divisor": 0.0})
    assert int8.bytes_per_token == 2 * 3 * (80 + 2 * 3)
    assert bf16.bytes_per_token == bf16.bf16_bytes_per_token == 2 * 3 * 80 * 2
    assert int8.layer_index(5) == 2
    with pytest.raises(CacheError, match=r"layer 1 is not in this cache; it holds \[0, 2, 5\]"):
        int8.layer_index(1)
