"""Axes of charts: where a value lies, and which round values are written beside it."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

LOG_RATIO = 8
"""Positive values that span more than this ratio get a logarithmic axis."""


class Axis(NamedTuple):
    """Values to shares (0 to 1) of an axis."""

    first: float
    last: float
    log: bool
    ticks: list[float]

    def place(self, values: npt.ArrayLike) -> Doubles:
        numbers = np.asarray(values, np.float64)
        if self.log:
            first, last, numbers = np.log(self.first), np.log(self.last), np.log(numbers)
        else:
            first, last = np.float64(self.first), np.float64(self.last)
        return np.asarray(np.clip((numbers - first) / (last - first), 0, 1), np.float64)


def axis(values: Doubles, log: bool | None = None) -> Axis:
    """An axis with round ticks around the finite values; log None: where the values ask for it."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if log is None:
        log = low > 0 and high / low > LOG_RATIO
    if log and low > 0 and high > low:
        return _log_axis(low, high)
    low = min(0.0, low)
    high = high if high > low else low + 1
    step = _round_step((high - low) / 4)
    first, last = math.floor(low / step) * step, math.ceil(high / step - 1e-9) * step
    ticks = [first + step * i for i in range(round((last - first) / step) + 1)]
    return Axis(first, last, False, ticks)


def near_axis(values: Doubles) -> Axis:
    """As `axis`, but from the lowest value on."""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > LOG_RATIO:
        return _log_axis(low, high)
    step = _round_step((high - low or abs(high) or 1.0) / 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return Axis(first * step, max(last, first + 1) * step, False, [step * i for i in range(first, last + 1)])


def _log_axis(low: float, high: float) -> Axis:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in decades for digit in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) <= 6:
            break
    every = -(-len(inside) // 6)
    return Axis(low / 1.05, high * 1.05, True, inside[::every] if every else [low, high])


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= rough * 0.999)
