"""The quantiser that runs where the model does, against the cache's own codec."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from clt.cache_format.int8 import Measures, quantise, quantise_into
from clt.cache_format.layout import BLOCK
from clt.harvest.quantiser import (
    DeviceVectors,
    agrees,
    form_of,
    pairwise_sum,
    quantise_on_device,
    quantise_on_host,
)

WIDTHS = [1, 7, 63, 64, 80, 129, 576, 896, 2304, 2880, 4096]


def by_the_codec(values: torch.Tensor, divisor: float) -> DeviceVectors:
    made = DeviceVectors(
        *(torch.empty(shape, dtype=dtype) for shape, dtype in form_of(*values.shape).values())
    )
    quantise_on_host(values, divisor, made)
    return made


WAYS = (quantise_on_device, by_the_codec)


def draw(width: int, tokens: int = 40) -> np.ndarray:
    """Vectors of very different sizes, with massive channels, zeros and numbers next to nothing."""
    rng = np.random.default_rng(width)
    values = rng.standard_t(3, (tokens, width)).astype(np.float32)
    values *= np.exp2(rng.uniform(-40, 17, (tokens, 1))).astype(np.float32)
    values[::5, rng.integers(0, width)] *= 30
    values[1] = 0
    values[2] = 1e-44
    return values


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_those_of_numpy_bit_for_bit(width: int) -> None:
    values = np.abs(draw(width))
    assert np.array_equal(pairwise_sum(torch.from_numpy(values)).numpy(), values.sum(axis=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divisor", [8.0, 3.0])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("way", WAYS)
def test_codes_and_scales_are_the_codecs_bit_for_bit(
    way: Callable[[torch.Tensor, float], DeviceVectors], width: int, divisor: float, dtype: torch.dtype
) -> None:
    values = torch.from_numpy(draw(width)).clamp(-6e4, 6e4).to(dtype)
    before = values.clone()
    ours = way(values, divisor)
    assert torch.equal(values, before), "what the model goes on with was changed"
    codes, scale = quantise(values.float().numpy(), divisor)
    assert np.array_equal(ours.codes.numpy(), codes)
    assert np.array_equal(ours.scale.numpy(), scale)


@given(
    arrays.arrays(
        np.float32,
        st.tuples(st.just(3), st.integers(1, 200)),
        elements=st.floats(-(2.0**22), 2.0**22, width=32),
    )
)
def test_any_finite_values(values: np.ndarray) -> None:
    ours = quantise_on_device(torch.from_numpy(values), 8.0)
    codes, scale = quantise(values, 8.0)
    assert np.array_equal(ours.codes.numpy(), codes)
    assert np.array_equal(ours.scale.numpy(), scale)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("way", WAYS)
def test_what_the_statistics_ask_for(way: Callable[[torch.Tensor, float], DeviceVectors], width: int) -> None:
    """Norm, largest value and lost distance of the stored vector, from the numbers as a reader gets them."""
    values = draw(width)
    ours = way(torch.from_numpy(values), 8.0)
    step = np.repeat(ours.scale.numpy().astype(np.float64), BLOCK, axis=1)[:, :width]
    stored = ours.codes.numpy() * step
    np.testing.assert_allclose(ours.square.numpy(), (stored**2).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(ours.peak.numpy(), np.abs(stored).max(axis=1), rtol=1e-6)
    np.testing.assert_allclose(
        ours.noise.numpy(), ((stored - values) ** 2).sum(axis=1), rtol=1e-3, atol=1e-6 * step.max() ** 2
    )
    told = Measures(
        np.empty(len(values), np.float32), np.empty(len(values)), np.empty(len(values), np.float32)
    )
    quantise_into(quantise(values, 8.0), values, 8.0, told)
    assert np.array_equal(told.peak, ours.peak.numpy())
    np.testing.assert_allclose(told.square, ours.square.numpy(), rtol=1e-12)
    np.testing.assert_allclose(told.noise, ours.noise.numpy(), rtol=1e-5)


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf, 3e7])
@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_stored_shows_in_the_scale(
    way: Callable[[torch.Tensor, float], DeviceVectors], fault: float
) -> None:
    values = draw(80).clip(-6e4, 6e4)
    values[3, 70] = fault
    scale = way(torch.from_numpy(values), 8.0).scale.numpy()
    assert np.flatnonzero(~np.isfinite(scale).all(axis=1)).tolist() == [3]


def test_a_device_is_asked_whether_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one scale is seen."""
    assert agrees(torch.device("cpu"), 4096, 8.0)
    monkeypatch.setattr("clt.harvest.quantiser.GAUSSIAN", 1.2534)
    assert not agrees(torch.device("cpu"), 4096, 8.0)


def test_a_vector_that_cannot_be_stored_changes_no_other() -> None:
    """What lies beside it is stored to the last bit of its noise as without it."""
    values = torch.randn(50, 576, generator=torch.Generator().manual_seed(0))
    whole = by_the_codec(values, 8.0)
    values[20, 3] = float("nan")
    found = by_the_codec(values, 8.0)
    others = [row for row in range(50) if row != 20]
    assert not torch.isfinite(found.scale[20]).any()
    for before, after in zip(whole, found, strict=True):
        assert torch.equal(before[others], after[others])
