"""quantise.c and gather.c against what numpy makes of the same arrays: the same bits, or the same refusal."""

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clt.cache_format import CacheError, bf16, gathered, int8
from clt.cache_format.compiled import COMPILED
from clt.cache_format.int8 import Measures, Quantised, quantise, quantise_into
from clt.cache_format.layout import BLOCK, BLOCKS, n_blocks

pytestmark = pytest.mark.skipif(not COMPILED, reason="quantise.c is not compiled here")

WIDTHS = [1, 5, 8, 63, 64, 65, 100, 128, 129, 130, 136, 576, 1000, 1152, 2304, 4096, 5120]
EDGE = 127 * 65504.0
EXTREMES = st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1.2e-38, 2.0**-24, 2.0**-14, 0.5, -1.5, 65504.0, EDGE, -EDGE]
)


def by_numpy(work: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (int8, bf16, gathered):
            patch.setattr(module, "COMPILED", False)
        return work()


def measured(
    values: npt.NDArray[np.float32], divisor: float, block: int = BLOCK
) -> tuple[Quantised, Measures]:
    tokens, width = values.shape
    scale = np.empty((tokens, n_blocks(width, block)), np.float16)
    made = Quantised(np.empty((tokens, width), np.int8), scale)
    told = Measures(np.empty(tokens, np.float32), np.empty(tokens), np.empty(tokens, np.float32))
    quantise_into(made, values, divisor, told)
    return made, told


def assert_same(values: npt.NDArray[np.float32], divisor: float) -> None:
    for block in BLOCKS:
        assert_same_in_blocks(values, divisor, block)


def assert_same_in_blocks(values: npt.NDArray[np.float32], divisor: float, block: int) -> None:
    try:
        (codes, scale), expected = by_numpy(lambda: measured(values, divisor, block))
    except CacheError as fault:
        for work in (measured, quantise):
            with pytest.raises(CacheError, match=str(fault)[:30]):
                work(values, divisor, block)
        return
    made, told = measured(values, divisor, block)
    for ours in (made, quantise(values, divisor, block)):
        np.testing.assert_array_equal(ours.codes, codes)
        np.testing.assert_array_equal(ours.scale.view(np.uint16), scale.view(np.uint16))
    np.testing.assert_array_equal(told.peak, expected.peak)
    np.testing.assert_allclose(told.square, expected.square, rtol=1e-13)
    np.testing.assert_allclose(told.noise, expected.noise, rtol=1e-5)


def draw(width: int, tokens: int = 60) -> npt.NDArray[np.float32]:
    """Heavy tails, massive channels, zeros, next to nothing; and numbers with few digits, which tie."""
    rng = np.random.default_rng(width)
    values = rng.standard_t(3, (tokens, width)).astype(np.float32)
    values *= np.exp2(rng.uniform(-45, 17, (tokens, 1))).astype(np.float32)
    values[::5, rng.integers(0, width)] *= 30
    values[1], values[2] = 0, 1e-44
    values[3] = rng.integers(-254, 255, width) / np.float32(2)
    return values.clip(-EDGE, EDGE)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_chosen_rows_are_what_they_are_alone(width: int, compiled: bool) -> None:
    """In any order, some twice."""
    values, rows = draw(width), np.array([7, 3, 3, 59, 0])

    def work() -> tuple[Quantised, Measures]:
        alone = made, told = measured(values[rows], 8.0)
        for array in (*made, *told):
            array[:] = 0
        quantise_into(made, values, 8.0, told, rows)
        return alone

    (made, told), (expected, expected_told) = (
        (work() if compiled else by_numpy(work)),
        measured(values[rows], 8.0),
    )
    for ours, theirs in zip((*made, told.peak), (*expected, expected_told.peak), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(told.square, expected_told.square, rtol=1e-13)
    np.testing.assert_allclose(told.noise, expected_told.noise, rtol=1e-5)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("width", [31, 577])
def test_threads_of_a_loaded_openmp_change_no_bit(width: int, chosen: bool, threads: int) -> None:
    torch = pytest.importorskip("torch")
    if torch.backends.openmp.is_available() and sys.platform == "linux":  # or one thread would do it all
        assert hasattr(ctypes.CDLL(None), "GOMP_parallel")
    values = draw(width, 1000)
    rows = np.random.default_rng(0).permutation(1000)[:777] if chosen else None
    (made, told), (other, other_told) = (measured(values[:777], 8.0) for _ in range(2))
    quantise_into(made, values if chosen else values[:777], 8.0, told, rows)
    quantise_into(other, values if chosen else values[:777], 8.0, other_told, rows, threads=threads)
    for one, two in zip((*made, *told), (*other, *other_told), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("token", [0, 63, 64, 999])
def test_any_thread_tells_of_a_value_that_cannot_be_stored(token: int) -> None:
    pytest.importorskip("torch")
    values = draw(96, 1000)
    values[token, 5] = np.nan
    made = Quantised(np.empty((1000, 96), np.int8), np.empty((1000, 3), np.float16))
    with pytest.raises(CacheError, match="not finite"):
        quantise_into(made, values, 8.0, threads=4)


def test_without_openmp_the_caller_does_it_alone() -> None:
    """In a process that has loaded none."""
    program = """
import ctypes, numpy as np
from clt.cache_format.int8 import Quantised, quantise, quantise_into
assert not hasattr(ctypes.CDLL(None), "GOMP_parallel")
values = np.random.default_rng(0).standard_normal((999, 96), np.float32)
expected = quantise(values, 8.0)
made = Quantised(np.empty_like(expected.codes), np.empty_like(expected.scale))
quantise_into(made, values, 8.0, threads=4)
assert (made.codes == expected.codes).all() and (made.scale == expected.scale).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("divisor", [8.0, 16.0, 0.3, 3.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_vectors_of_every_size(width: int, divisor: float) -> None:
    assert_same(draw(width), divisor)
    assert_same(-draw(width)[::2], divisor)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 300)),
        elements=st.floats(width=32) | EXTREMES,
        fill=st.floats(-100, 100, width=32) | EXTREMES,
    ),
    st.sampled_from([8.0, 1.0, 64.0]),
)
@example(np.full((2, 70), EDGE, np.float32), 1.0)
@example(np.full((2, 70), np.nan, np.float32), 8.0)
def test_any_floats(values: npt.NDArray[np.float32], divisor: float) -> None:
    """NaN, infinity and what is too large are refused by both."""
    assert_same(values, divisor)


@given(st.integers(0, 2**32), st.integers(-20, 9))
def test_ties_go_to_the_even_code(seed: int, exponent: int) -> None:
    """A peak of 127 steps in every block, and values halfway between two codes."""
    rng = np.random.default_rng(seed)
    values = (rng.integers(-127, 127, (4, 2 * BLOCK)) + 0.5).astype(np.float32)
    values[:, ::BLOCK] = 127
    values *= np.float32(2.0**exponent)
    codes, scale = quantise(values, 1e4)
    assert (scale == np.float16(2.0**exponent)).all()
    np.testing.assert_array_equal(codes, np.rint(values / np.float32(2.0**exponent)))
    assert_same(values, 1e4)


@given(arrays(np.uint32, (3, 70), elements=st.integers(0, 2**32 - 1)))
@example(
    np.array([[0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x80000001, 0x7F800001, 0xFFC12345, 0x7F800000]] * 3, "u4")
)
def test_bf16_of_any_bits(bits: npt.NDArray[np.uint32]) -> None:
    """Rounded alike, NaN payloads included; norms in float64, which nothing swallows or overflows."""
    values = bits.view(np.float32)
    expected = by_numpy(lambda: bf16.to_bf16_bits(values))
    np.testing.assert_array_equal(bf16.to_bf16_bits(values), expected)

    def store(given: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        place, square, peak = np.empty(values.shape, np.uint16), np.empty(3), np.empty(3, np.float32)
        with np.errstate(invalid="ignore"):
            bf16.store_bits(place, given, square, peak)
        return place, square, peak

    for given_as in (values, expected):
        ours, theirs = store(given_as), by_numpy(lambda given_as=given_as: store(given_as))
        np.testing.assert_array_equal(ours[0], expected)
        np.testing.assert_array_equal(theirs[0], expected)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-13)
        np.testing.assert_array_equal(ours[2], theirs[2])


@pytest.mark.parametrize("precision", ["int8", "int8 of 64", "bf16"])
@pytest.mark.parametrize("tokens", [1, 64, 65, 150])
@pytest.mark.parametrize("width", [1, 64, 80, 576, 1100])
def test_chunks_and_sums(width: int, tokens: int, precision: str) -> None:
    """The same bytes in the same order; sums to the last bit, for both add one vector after the other."""
    rng = np.random.default_rng(tokens)
    values, order = draw(width, max(tokens, 6))[:tokens], rng.permutation(tokens)
    group = rng.integers(0, 8, tokens)

    def work() -> tuple[list[Any], npt.NDArray[np.float64]]:
        sums = np.ones((8, width))
        if precision != "bf16":
            quantised = quantise(values, 8.0, 64 if precision == "int8 of 64" else 32)
            chunks = [*gathered.gather_codes(quantised, order, group, sums)]
            return [(f.sizes, b"".join(f.parts), steps.tobytes()) for f, steps in chunks], sums
        frames = gathered.gather_bits(bf16.to_bf16_bits(values), order, group, sums)
        return [(f.sizes, b"".join(f.parts)) for f in frames], sums

    (chunks, sums), (expected, expected_sums) = work(), by_numpy(work)
    assert chunks == expected
    np.testing.assert_array_equal(sums, expected_sums)


THREADS = 1
X, CODES, SCALE = np.ones((4, 80), "f4"), np.zeros((4, 80), "i1"), np.zeros((4, 3), "f2")
TOLD = np.empty(4, "f4"), np.empty(4), np.empty(4, "f4")
BITS, CHUNK, STEPS = np.zeros((4, 80), "u2"), np.empty((64, 80), "i1"), np.empty((64, 3), "f2")
ORDER, GROUP, SUMS = np.arange(3), np.zeros(4, "i8"), np.zeros((8, 80))
CALLS = {
    "_quantise.quantise": (X, 80, 0.1, THREADS, CODES, SCALE, *TOLD),
    "_quantise.quantise of rows": (X, 80, 0.1, THREADS, CODES, SCALE, *TOLD, np.array([2, 0, 3, 1])),
    "_quantise.round_to_bf16": (X, 80, BITS, *TOLD[1:]),
    "_gather.gather_codes": (CODES, SCALE, 80, ORDER, GROUP, CHUNK, STEPS, SUMS),
    "_gather.gather_planes": (BITS, 80, ORDER, GROUP, CHUNK, CHUNK.copy(), SUMS),
}


@pytest.mark.parametrize("name", CALLS)
def test_buffers_that_do_not_belong_together_are_refused(name: str) -> None:
    """Nothing is read or written behind an end, whichever argument is wrong."""
    module, function = name.split()[0].split(".")
    call, right = getattr(importlib.import_module(f"clt.cache_format.{module}"), function), CALLS[name]
    call(*right)
    for nth, argument in enumerate(right):
        if isinstance(argument, float) or argument is THREADS:
            continue
        short = (79, 0, -80, 2**62) if isinstance(argument, int) else (argument[:-1], argument[..., :0])
        for wrong in short:
            if argument is ORDER:
                continue  # fewer rows are a short chunk
            with pytest.raises((ValueError, BufferError)):
                call(*right[:nth], wrong, *right[nth + 1 :])
    with pytest.raises((ValueError, BufferError)):
        call(right[0].T, *right[1:])
    with pytest.raises((ValueError, BufferError, TypeError)):
        call(*right[:-2], right[-1])


@pytest.mark.parametrize("name", ["_gather.gather_codes", "_gather.gather_planes"])
@pytest.mark.parametrize(
    "wrong", [{"order": [0, 4]}, {"order": [-1]}, {"group": [0, 8, 0, 0]}, {"group": [0, -1, 0, 0]}]
)
def test_rows_and_groups_out_of_range_are_refused(name: str, wrong: dict[str, list[int]]) -> None:
    module, function = name.split(".")
    call = getattr(importlib.import_module(f"clt.cache_format.{module}"), function)
    places = {"order": ORDER, "group": GROUP, **{key: np.array(value) for key, value in wrong.items()}}
    given_as = {id(ORDER): places["order"], id(GROUP): places["group"]}
    with pytest.raises(ValueError, match="do not belong together"):
        call(*(given_as.get(id(argument), argument) for argument in CALLS[name]))
    with pytest.raises(ValueError, match="do not belong together"):
        call(*(np.zeros(65, "i8") if argument is ORDER else argument for argument in CALLS[name]))


@pytest.mark.parametrize("rows", [[0, 1, 4, 2], [0, -1, 2, 2]])
def test_chosen_rows_out_of_range_are_refused(rows: list[int]) -> None:
    quantise_rows = importlib.import_module("clt.cache_format._quantise").quantise
    with pytest.raises(ValueError, match="do not belong together"):
        quantise_rows(X, 80, 0.1, THREADS, CODES, SCALE, *TOLD, np.array(rows))
