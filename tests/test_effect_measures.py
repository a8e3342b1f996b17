"""The measures and intervals of the experiment on NEFTune's effect, against known answers."""

import itertools
import math

import pytest

from experiments.effect.intervals import holm, paired_interval, t_quantile, t_two_sided
from experiments.effect.measures import ngrams, repeated_share, rouge_l, seen_share


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, section 3.1: P = R = 3/4
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("Return `x`, the END.", "return x the end", 1.0),
        ("a b c d e f", "a c", 0.5),  # P = 2/6, R = 1
        ("a b", "c d", 0.0),
        ("", "a", 0.0),
        ("...", "a", 0.0),
    ],
)
def test_rouge_l(answer, reference, expected):
    """The F-measure of the longest common subsequence of words, whatever their case and the marks between them."""
    assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-15)


def test_repeated_share():
    """1 - distinct / all n-grams; none where there are too few tokens."""
    assert ngrams("abcd", 3) == [("a", "b", "c"), ("b", "c", "d")]
    assert repeated_share("abcabcabc", 4) == 0.5  # abca bcab cabc, twice each
    assert repeated_share("aaaaa", 4) == 0.5
    assert repeated_share("abcdefgh", 4) == 0
    assert repeated_share("abc", 4) == 0


def test_seen_share():
    """Each n-gram of the answers counts, also those that are there twice; none runs across two answers or two texts."""
    assert seen_share(["abcd", "xbcd"], ["zabc", "bcd"], 3) == 0.75  # abc, bcd, bcd of abc, bcd, xbc, bcd
    assert seen_share(["ab", "cd"], ["abcd"], 3) == 0  # no n-gram at all
    assert seen_share(["abc"], ["ab", "c"], 3) == 0


def test_t_distribution():
    """Two-sided 95 % quantiles as any table has them, and P(abs(T) > 2)."""
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 10: 2.22814, 30: 2.04227}
    for degrees, quantile in table.items():
        assert t_quantile(degrees) == pytest.approx(quantile, rel=2e-6)
    assert t_two_sided(2.0, 1) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert t_two_sided(2.0, 2) == pytest.approx(1 - 2 / math.sqrt(6))
    assert t_two_sided(0.0, 7) == 1


def test_paired_interval():
    """Differences 1, 2, 3, 4, 5: mean 3, standard error sqrt(2.5 / 5), t = 4.2426 with 4 degrees, p = 0.013236."""
    interval = paired_interval([11, 12, 13, 14, 15], [10, 10, 10, 10, 10])
    assert (interval.mean, interval.n) == (3, 5)
    assert interval.half_width == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)
    # P(abs(T) > t) for 4 degrees is 1 - s (1 + c^2 / 2), c^2 = 4 / (4 + t^2) = 2 / 11
    assert interval.p == pytest.approx(1 - 3 / math.sqrt(11) * (1 + 1 / 11), rel=1e-12)
    assert not interval.contains_zero
    assert paired_interval([1, -1, 1, -1], [0, 0, 0, 0]).contains_zero
    assert paired_interval([1, 2], [1, 2]) == paired_interval([3, 4], [3, 4])
    assert (paired_interval([1, 2], [0, 1]).half_width, paired_interval([1, 2], [0, 1]).p) == (0, 0)
    assert paired_interval([1, 2], [1, 2]).p == 1


def test_holm():
    """Holm 1979: the smallest p times their number, the next times one less, never below the one before, never above 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    for order in itertools.permutations([0.01, 0.02, 0.5]):
        assert dict(zip(order, holm(order), strict=True)) == pytest.approx({0.01: 0.03, 0.02: 0.04, 0.5: 0.5})
