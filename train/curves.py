"""metrics.jsonl thinned to at most 500 points, in one pass and in bounded memory."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

MAX_POINTS = 500


class Curve(NamedTuple):
    """One metric; arrays of one length, without the points where it has no value."""

    step: Doubles
    """Last optimiser step of each point"""
    mean: Doubles
    low: Doubles
    high: Doubles


class Curves:
    """Every metric by step. A point stands for `stride` consecutive lines; the last one may stand for fewer.

    When all points are taken, neighbours are merged and the stride doubles. So each line costs the same
    however long the run is, and the result depends on the lines alone.
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.stride, self.lines = 1, 0
        self._max_points = max_points - max_points % 2
        self._columns: dict[str, int] = {}
        self._steps = np.zeros(self._max_points)
        self._table = self._empty(0)
        self.last: dict[str, Any] = {}
        """The newest line."""

    @classmethod
    def read(cls, path: Path) -> "Curves":
        """Of a metrics.jsonl; a last line that was cut off is left out."""
        curves = cls()
        if path.exists():
            with open(path) as file:
                for line in file:
                    if line.endswith("\n"):
                        curves.add(json.loads(line))
        return curves

    @property
    def n_points(self) -> int:
        return -(-self.lines // self.stride)

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def add(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl; null is a value that is missing."""
        if self.lines == self.stride * self._max_points:
            self._halve()
        for name in line.keys() - self._columns.keys() - {"step"}:
            self._columns[name] = len(self._columns)
            self._table = np.concatenate([self._table, self._empty(1)], axis=2)
        place = self.lines // self.stride
        values = np.array([line.get(name) for name in self._columns], np.float64)  # None becomes NaN
        known = ~np.isnan(values)
        total, count, low, high = self._table[:, place]
        total[known] += values[known]
        count += known
        np.fmin(low, values, out=low)
        np.fmax(high, values, out=high)
        self._steps[place] = line["step"]
        self.lines += 1
        self.last = line

    def __getitem__(self, name: str) -> Curve:
        """All points of a metric; none where no line has it."""
        if name not in self._columns:
            return Curve(*(np.zeros(0) for _ in Curve._fields))
        total, count, low, high = self._table[:, : self.n_points, self._columns[name]]
        has = count > 0
        return Curve(self._steps[: self.n_points][has], total[has] / count[has], low[has], high[has])

    def _empty(self, n_columns: int) -> Doubles:
        """(sum, count, lowest, highest; point; metric) of no values."""
        table = np.zeros((4, self._max_points, n_columns))
        table[2:] = np.nan
        return table

    def _halve(self) -> None:
        pairs = self._table.reshape(4, -1, 2, self._table.shape[2])
        table = self._empty(self._table.shape[2])
        half = self._max_points // 2
        table[:2, :half] = pairs[:2].sum(axis=2)
        table[2, :half] = np.fmin(pairs[2, :, 0], pairs[2, :, 1])
        table[3, :half] = np.fmax(pairs[3, :, 0], pairs[3, :, 1])
        self._table = table
        self._steps[:half] = self._steps[1::2].copy()
        self.stride *= 2
