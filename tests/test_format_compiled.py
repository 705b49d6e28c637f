"""quantise.c against what numpy makes of the same values: the same bits, or the same refusal."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clt.cache_format import CacheError, codec
from clt.cache_format.compiled import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED, reason="quantise.c is not compiled here")

WIDTHS = [1, 5, 8, 63, 64, 65, 100, 128, 129, 130, 136, 576, 1000, 1152, 2304, 4096, 5120]
EDGE = 127 * 65504.0
EXTREMES = st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1.2e-38, 2.0**-24, 2.0**-14, 0.5, -1.5, 65504.0, EDGE, -EDGE]
)


def by_numpy(values: npt.NDArray[np.float32], divisor: float) -> codec.Quantised:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "COMPILED", False)
        return codec.quantise(values, divisor)


def assert_same(values: npt.NDArray[np.float32], divisor: float) -> None:
    try:
        codes, scale = by_numpy(values, divisor)
    except CacheError as fault:
        with pytest.raises(CacheError, match=str(fault)[:30]):
            codec.quantise(values, divisor)
        return
    ours = codec.quantise(values, divisor)
    np.testing.assert_array_equal(ours.codes, codes)
    np.testing.assert_array_equal(ours.scale.view(np.uint16), scale.view(np.uint16))


@pytest.mark.parametrize("divisor", [8.0, 16.0, 0.3, 3.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_vectors_of_every_size(width: int, divisor: float) -> None:
    """Heavy tails, massive channels, zeros, next to nothing; also of numbers with few digits, which tie."""
    rng = np.random.default_rng(width)
    values = rng.standard_t(3, (60, width)).astype(np.float32)
    values *= np.exp2(rng.uniform(-45, 17, (60, 1))).astype(np.float32)
    values[::5, rng.integers(0, width)] *= 30
    values[1], values[2] = 0, 1e-44
    values[3] = rng.integers(-254, 255, width) / np.float32(2)
    values.clip(-EDGE, EDGE, out=values)
    assert_same(values, divisor)
    assert_same(-values[::2], divisor)


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


@given(
    arrays(np.float32, (1, 64), elements=st.integers(-127, 127).map(lambda n: n + 0.5), fill=st.just(127.0))
)
def test_ties_go_to_the_even_code(values: npt.NDArray[np.float32]) -> None:
    """Steps of one: a peak of 127 in a block whose mean asks for less."""
    assert_same(values.clip(-127, 127), 1000.0)


def test_buffers_that_do_not_belong_together_are_refused() -> None:
    """Nothing is read or written behind an end."""
    from clt.cache_format import _quantise

    x, codes, scale = np.ones((3, 80), np.float32), np.empty((3, 80), np.int8), np.empty((3, 2), np.float16)
    told = np.empty(3, np.float32), np.empty(3), np.empty(3, np.float32)
    assert _quantise.quantise(x, 80, 0.1, codes, scale, *told) == -1
    for wrong in (
        (x[:2], 80, 0.1, codes, scale),
        (x, 79, 0.1, codes, scale),
        (x, 0, 0.1, codes, scale),
        (x, -80, 0.1, codes, scale),
        (x, 80, 0.1, codes, scale[:2]),
        (x, 80, 0.1, codes, scale, told[0][:2], *told[1:]),
        (x, 80, 0.1, codes, scale, told[0], told[1][:2], told[2]),
        (x, 80, 0.1, codes, scale, *told[:2], told[2][:2]),
    ):
        with pytest.raises(ValueError, match="do not belong together"):
            _quantise.quantise(*wrong)
    with pytest.raises((ValueError, BufferError)):
        _quantise.quantise(x.T, 80, 0.1, codes, scale)
