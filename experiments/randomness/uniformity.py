"""Statistics of noise on a lattice, and their laws if the noise is independent and uniform.

Noise is given as *levels*: integers in ``[0, 2**bits)``, that stand for ``u = (2 * level + 1 - 2**bits) / 2**bits``. Those are
all the values that the noise can take, 2**16 for 16-bit element types and 2**23 for the others, so every law below is that
of the lattice and not of a continuous uniform. All p-values are two-sided: noise that is too even is as suspicious as noise
that is too uneven.
"""

import functools
import math
from collections.abc import Iterable

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

#: Expected overshoot of a random walk, -zeta(1/2) / sqrt(2 pi): Siegmund 1985; Broadie, Glasserman and Kou 1997.
OVERSHOOT = 0.5826


def two_sided(tail: float) -> float:
    """The p-value of a statistic of which both tails count, from the probability of one."""
    return min(1.0, 2 * min(tail, 1 - tail))


def normal(z: float) -> float:
    """The p-value of a standard normal deviate."""
    return float(2 * stats.norm.sf(abs(z)))


def values(bits: int) -> np.ndarray:
    """The noise of each level, ``[2**bits]``."""
    return (2 * np.arange(1 << bits, dtype=np.float64) + 1 - (1 << bits)) / (1 << bits)


def standardised(levels: Tensor, bits: int) -> Tensor:
    """The noise of `levels` divided by its standard deviation, float32."""
    variance = (1 - 4.0**-bits) / 3  # of the lattice
    return (2 * levels + (1 - (1 << bits))).float() * (2.0**-bits / math.sqrt(variance))


@functools.cache
def _scores(bits: int) -> Tensor:
    scores = special.ndtri((np.arange(1 << bits) + 0.5) / (1 << bits))
    return torch.from_numpy((scores / scores.std()).astype(np.float32))


def normal_scores(levels: Tensor, bits: int) -> Tensor:
    """Independent normal deviates of variance 1, float32, if the levels are independent and uniform.

    Of normal deviates the periodogram ordinates are independent and exponential; of uniform ones only nearly so.
    """
    return _scores(bits)[levels]


def chi_square(counts: np.ndarray) -> tuple[float, float]:
    """Statistic and p-value of the hypothesis that all cells are equally likely."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return statistic, sum_of_squares(statistic, counts.size - 1)


def sum_of_squares(statistic: float, degrees: int) -> float:
    """The p-value of a sum of squares of `degrees` independent standard normal deviates."""
    upper, lower = stats.chi2.sf(statistic, degrees), stats.chi2.cdf(statistic, degrees)
    return min(1.0, 2 * float(min(upper, lower)))


def kolmogorov_smirnov(distance: float, n: int, cells: float = math.inf) -> float:
    """The p-value of the largest distance of an empirical distribution from the true one.

    Kolmogorov's law, that of the largest value of a Brownian bridge. Of a lattice the bridge is seen at `cells` points only,
    between which it goes a little further: by ``OVERSHOOT / sqrt(cells)``.
    """
    return two_sided(float(stats.kstwobign.sf(math.sqrt(n) * distance + OVERSHOOT / math.sqrt(cells))))


def lattice_distance(counts: np.ndarray) -> float:
    """The largest distance of the distribution of `counts` from the uniform one."""
    cells = np.arange(1, counts.size + 1)
    return float(np.abs(np.cumsum(counts) / counts.sum() - cells / counts.size).max())


def exponential_distance(sample: np.ndarray) -> float:
    """The largest distance of the distribution of `sample` from the exponential one of mean 1."""
    n, law = sample.size, -np.expm1(-np.sort(sample, axis=None).astype(np.float64))
    ranks = np.arange(n)
    return float(max((law - ranks / n).max(), ((ranks + 1) / n - law).max()))


def largest(tail: float, number: int) -> float:
    """The p-value of the largest of `number` independent statistics, of which one exceeds it with probability `tail`."""
    return two_sided(-math.expm1(number * math.log1p(-tail))) if tail < 1 else 0.0


def moments(counts: np.ndarray) -> dict[str, dict[str, float]]:
    """Those of the noise of the lattice, from the number of times that each level occurs; see ``moments_of``."""
    u = values(counts.size.bit_length() - 1)
    return moments_of([float((counts * u**power).sum()) for power in range(1, 5)], int(counts.sum()), u)


def moments_of(sums: list[float], n: int, u: np.ndarray) -> dict[str, dict[str, float]]:
    """Mean, variance, skewness and kurtosis about the known mean and, the last two, by the known standard deviation.

    `sums` are those of the first four powers of `n` numbers, and `u` are all values, equally likely, that these can have. Each
    with what is expected, its standard error and its p-value.
    """
    exact = {power: float((u**power).mean()) for power in range(1, 9)}
    deviation = math.sqrt(exact[2])
    found = {}
    for power, name in enumerate(("mean", "variance", "skewness", "kurtosis"), 1):
        unit = deviation**power if power > 2 else 1.0
        value, expected = sums[power - 1] / n / unit, exact[power] / unit
        error = math.sqrt((exact[2 * power] - exact[power] ** 2) / n) / unit
        p = normal((value - expected) / error)
        found[name] = {"value": value, "expected": expected, "standard_error": error, "p": p}
    return found


def half_plane(plane: Tensor, columns: int) -> Tensor:
    """Of a symmetric function on a torus of `columns` columns, given ``[T, > columns / 2]``, each value once, ``[N]``.

    Left out are the origin, and the middle row and column, where some values are their own images.
    """
    rows = plane.shape[0]
    return torch.cat((plane[1 : (rows + 1) // 2, 0], plane[:, 1 : (columns + 1) // 2].flatten()))


def periodogram(image: Tensor) -> Tensor:
    """Ordinates of an image ``[T, D]`` of variance 1, ``[N]``: independent, of mean 1; the mean's own is not among them."""
    return half_plane(torch.fft.rfft2(image).abs().square_(), image.shape[1]) / image.numel()


def correlations(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Correlation of images a, b ``[T, D]`` of variance 1 at every shift: a standard normal deviate each, ``[T, D]``.

    Shifts wrap around; the pairs are pooled. At ``[i, j]``: of ``a[t, c]`` and ``b[t + i, c + j]``.
    """
    spectrum, shape, n = torch.zeros(()), torch.Size(), 0
    for a, b in pairs:
        transformed = torch.fft.rfft2(a)
        other = transformed if a is b else torch.fft.rfft2(b)
        spectrum = spectrum + (transformed.conj() * other).to(torch.complex128)
        shape, n = a.shape, n + a.numel()
    return torch.fft.irfft2(spectrum, s=shape) / math.sqrt(n)


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's adjusted p-values: those below a level are rejected, and all these rejections hold at once at that level."""
    raw = np.array(list(p_values))
    order = np.argsort(raw)
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(raw[order] * np.arange(raw.size, 0, -1)))
    return [float(p) for p in adjusted]
