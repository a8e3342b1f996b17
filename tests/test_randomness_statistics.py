"""The statistics of experiments/randomness: each equals another implementation's, and knows the lattice that noise lies on."""

import numpy as np
import pytest
import torch
from scipy import stats

from experiments.randomness import uniformity

rng = np.random.default_rng


def test_chi_square_is_scipys_and_two_sided():
    counts = rng(0).multinomial(10_000, [1 / 64] * 64)
    statistic, p = uniformity.chi_square(counts)
    expected = stats.chisquare(counts)
    assert statistic == pytest.approx(expected.statistic)
    assert p == pytest.approx(2 * min(expected.pvalue, 1 - expected.pvalue))
    assert uniformity.chi_square(np.full(64, 100)) == (0.0, 0.0)  # too even to be true


def test_exponential_distance_is_scipys():
    sample = rng(1).exponential(size=5000)
    expected = stats.kstest(sample, "expon")
    distance = uniformity.exponential_distance(sample)
    assert distance == pytest.approx(expected.statistic)
    # Kolmogorov's law is a limit; at 5000 values it is off by less than 0.01.
    p = uniformity.kolmogorov_smirnov(distance, sample.size)
    assert p == pytest.approx(2 * min(expected.pvalue, 1 - expected.pvalue), abs=0.02)


def test_lattice_distance():
    assert uniformity.lattice_distance(np.array([1, 1, 1, 1])) == 0
    assert uniformity.lattice_distance(np.array([4, 0, 0, 0])) == 0.75
    assert uniformity.lattice_distance(np.array([0, 1, 1, 2])) == 0.25


def test_kolmogorov_smirnov_knows_the_lattice():
    """On 64 cells the continuous law would be off by up to 0.12; the frequencies have standard errors of 0.0035."""
    counts = rng(2).multinomial(20_000, [1 / 64] * 64, size=20_000)
    distances = np.abs(counts.cumsum(axis=1) / 20_000 - np.arange(1, 65) / 64).max(axis=1)
    for quantile in (0.5, 0.8, 0.95):
        distance = np.quantile(distances, quantile)
        p = uniformity.kolmogorov_smirnov(distance, 20_000, cells=64)
        assert p == pytest.approx(2 * min(quantile, 1 - quantile), abs=0.03)


def test_moments_of_the_whole_lattice_are_exact():
    for bits in (4, 16):
        found = uniformity.moments(np.full(1 << bits, 3))
        u = uniformity.values(bits)
        assert found["mean"]["value"] == pytest.approx(0, abs=1e-15)
        assert found["variance"]["value"] == pytest.approx(u.var())
        assert found["kurtosis"]["value"] == pytest.approx(stats.kurtosis(u, fisher=False))
        assert all(result["p"] == pytest.approx(1, abs=1e-6) for result in found.values())


def test_moments_have_their_standard_errors():
    """Over 4000 samples of 1000 values; a standard deviation from 4000 has a standard error of 1.2 %."""
    samples = rng(3).integers(16, size=(4000, 1000))
    found = [uniformity.moments(np.bincount(sample, minlength=16)) for sample in samples]
    for name, result in found[0].items():
        deviation = np.std([moments[name]["value"] for moments in found])
        assert deviation == pytest.approx(result["standard_error"], rel=0.06)


def test_p_values():
    assert uniformity.normal(1.959964) == pytest.approx(0.05, rel=1e-5)
    assert uniformity.normal(-1.959964) == pytest.approx(0.05, rel=1e-5)
    median = stats.chi2.ppf(0.5, 10)
    assert uniformity.sum_of_squares(median, 10) == pytest.approx(1)
    assert uniformity.sum_of_squares(stats.chi2.ppf(0.975, 10), 10) == pytest.approx(0.05)
    # Of 1000 statistics one exceeds the 1 - 1e-6 quantile with probability 1 - (1 - 1e-6)**1000.
    assert uniformity.largest(1e-6, 1000) == pytest.approx(2 * (1 - (1 - 1e-6) ** 1000))
    assert uniformity.largest(0.01, 1000) == pytest.approx(2 * 0.99**1000)  # a largest one that is too small


def test_holm():
    """Textbook: sorted p-values times 4, 3, 2, 1, made increasing."""
    assert uniformity.holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert uniformity.holm([0.9, 0.8]) == [1, 1]


def test_correlations_at_every_shift():
    a, b, c, d = torch.randn(4, 6, 10, dtype=torch.float64)
    shifts = uniformity.correlations([(a, b), (c, d)])
    for i, j in ((0, 0), (1, 0), (0, 3), (5, 9)):
        pooled = (a * b.roll((-i, -j), (0, 1))).sum() + (c * d.roll((-i, -j), (0, 1))).sum()
        assert shifts[i, j] == pytest.approx(float(pooled) / 120**0.5)


@pytest.mark.parametrize("shape", [(6, 10), (5, 10), (6, 7), (5, 7)])
def test_half_plane_has_each_shift_once(shape):
    rows, columns = shape
    labels = torch.arange(rows * columns).reshape(shape)
    images = labels.flip(0, 1).roll((1, 1), (0, 1))  # the label at minus the shift
    kept = uniformity.half_plane(labels, columns).tolist()
    twins = uniformity.half_plane(images, columns).tolist()
    assert 0 not in kept
    assert len({*kept}) == len(kept)
    # A value and its twin are never both kept.
    assert not {*kept} & {*twins}
    assert torch.equal(uniformity.half_plane(labels[:, : columns // 2 + 1], columns), torch.tensor(kept))


def test_periodogram():
    """White noise has ordinates of mean 1; a wave of amplitude a adds n a**2 / 4 to one of them."""
    tokens, columns = torch.arange(32.0)[:, None], torch.arange(64.0)
    wave = 0.5 * torch.cos(2 * torch.pi * (5 * tokens / 32 + 9 * columns / 64))
    ordinates = uniformity.periodogram(wave)
    assert ordinates.max() == pytest.approx(32 * 64 * 0.25 / 4, rel=1e-4)
    assert (ordinates > 1e-3).sum() == 1
    noise = uniformity.periodogram(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)))
    assert float(noise.mean()) == pytest.approx(1, abs=5 / noise.numel() ** 0.5)


def test_normal_scores():
    scores = uniformity.normal_scores(torch.arange(65536), 16).double()
    assert (scores.diff() > 0).all()
    assert float(scores.mean()) == pytest.approx(0, abs=1e-6)
    assert float(scores.square().mean()) == pytest.approx(1, abs=1e-6)
    assert float(scores[39321]) == pytest.approx(stats.norm.ppf(0.6), abs=1e-3)


def test_standardised():
    noise = uniformity.standardised(torch.arange(65536), 16).double()
    assert float(noise.square().mean()) == pytest.approx(1, abs=1e-6)
