"""How sure a held-out number is: ratios of sums over samples, with 95 % confidence intervals.

Tokens of one sample are alike, so that samples are what counts as drawn, not tokens. A FVU is a ratio of two
sums over samples, of squared errors and of squared deviations; its variance is that of the ratio estimator
(Cochran, Sampling Techniques, section 2.11): with d_i = e_i - r v_i the half width is
1.96 sqrt(n / (n - 1) sum d_i^2) / sum v_i. More than GROUPS samples are put together by their numbers.
That of explained variance is the same of errors from their mean. A dead share counts what no sample met, as
ecologists count species; its variance is that of the jackknife, which leaves out one sample at a time
(Heltshe and Forrester, Biometrics 39, 1983).
"""

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

GROUPS = 1024
"""Of samples, at most: what is kept by group is then bounded, and the intervals still hold."""
Z = 1.96


def half_width(sums: Doubles, bases: Doubles) -> float:
    """Of sums over bases, both (group, ...); along further axes the mean of the ratios is meant.

    nan where fewer than two groups have any base.
    """
    parts = (sums.reshape(len(sums), -1), bases.reshape(len(bases), -1))
    total = parts[1].sum(axis=0)
    residual = ((parts[0] - parts[0].sum(axis=0) / total * parts[1]) / total).mean(axis=1)
    n = int((parts[1] != 0).any(axis=1).sum())
    if n < 2:
        return float("nan")
    return float(Z * np.sqrt(n / (n - 1) * np.square(residual).sum()))


def half_widths(sums: Doubles, bases: Doubles) -> Doubles:
    """Of each of the ratios: (group, layer) both -> (layer,)."""
    return np.array([half_width(sums[:, [i]], bases[:, [i]]) for i in range(sums.shape[1])])


def share_half_width(alone: Doubles, of: int, groups: int) -> float:
    """Of the share of `of` latents that no group met: alone (group,) were met in that one group only.

    nan where fewer than two groups have tokens.
    """
    if groups < 2:
        return float("nan")
    squares = np.square(alone / of).sum() - np.square(alone.sum() / of) / groups
    return float(Z * np.sqrt((groups - 1) / groups * squares))


def group_of(sample: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """(token,) 0 to GROUPS - 1: neighbours in number are in different groups."""
    return sample.astype(np.int64) % GROUPS
