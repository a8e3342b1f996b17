"""Paired t intervals and Holm's correction, from the standard library alone."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


def t_two_sided(t: float, degrees: int) -> float:
    """P(abs(T) > t) for Student's T with a whole number of degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees % 2:
        term, series = cosine, cosine if degrees > 1 else 0.0
        for k in range(3, degrees - 1, 2):
            term *= cosine**2 * (k - 1) / k
            series += term
        inside = 2 / math.pi * (angle + sine * series)
    else:
        term = series = 1.0
        for k in range(2, degrees - 1, 2):
            term *= cosine**2 * (k - 1) / k
            series += term
        inside = sine * series
    return 1 - inside


def t_quantile(degrees: int, level: float = LEVEL) -> float:
    """The t with P(abs(T) <= t) = `level`."""
    low, high = 0.0, 1.0
    while 1 - t_two_sided(high, degrees) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - t_two_sided(middle, degrees) < level else (low, middle)
    return high


@dataclass(frozen=True)
class Interval:
    """Mean of paired differences, with its t interval and the p-value of "the mean is 0"."""

    mean: float
    half_width: float
    p: float
    n: int

    @property
    def contains_zero(self) -> bool:
        return abs(self.mean) <= self.half_width


def paired_interval(treated: Sequence[float], control: Sequence[float]) -> Interval:
    """Of ``treated[i] - control[i]``; at least two pairs."""
    differences = [a - b for a, b in zip(treated, control, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return Interval(mean, 0.0, float(mean == 0), n)
    return Interval(mean, t_quantile(n - 1) * error, t_two_sided(abs(mean) / error, n - 1), n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979), in the order of `p_values`."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
