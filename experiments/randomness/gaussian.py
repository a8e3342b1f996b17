"""Fits the constants of gaussian noise, and tells how far that noise is from the normal distribution.

    python -m experiments.randomness.gaussian

The contract, in :mod:`neft_kernels.ops.reference`, makes gaussian noise of a uniform ``u`` as ``u * p(x)``, where ``x`` is
about ``1 - log2(1 - u**2) / 32``. The exact quantile is ``ndtri((1 + u) / 2)``. The coefficients of the polynomial ``p``
minimise the largest difference over the levels of 16 bits and a sample of those of 23 bits, which is a linear program. ``p``
is then divided by sqrt(3) and factored: it has one real root and two pairs of conjugate roots.
"""

import sys

import numpy as np
import torch
from scipy import optimize, special

from neft_kernels.ops import reference

DEGREE = 5
SAMPLED = 6000  # levels of 23 bits, half of them by their distance from 1


def positive(bits: int) -> np.ndarray:
    """The positive uniforms of `bits` bits."""
    return np.arange(1, 1 << bits, 2) / (1 << bits)


def quantile(u: np.ndarray) -> np.ndarray:
    """The standard normal quantile of which `u` is the level."""
    return -special.ndtri((1 - u) / 2)


def fit() -> np.ndarray:
    """The constants A to F of ``A * (B - x) * ((x - C)**2 + D) * ((x - E)**2 + F)``."""
    fine = positive(23)
    near_one = 1 - np.exp2(-np.linspace(0, 23, SAMPLED // 2))
    places = np.append(np.linspace(0, len(fine) - 1, SAMPLED // 2).astype(int), np.searchsorted(fine, near_one))
    u = np.concatenate((positive(16)[::4], positive(16)[-512:], np.unique(fine[np.minimum(places, len(fine) - 1)])))
    z = quantile(u)
    w = reference._octaves(torch.from_numpy(u.astype(np.float32))).double().numpy() - 1  # better conditioned than x
    powers = np.stack([w**power * u for power in range(DEGREE + 1)], axis=1)
    error = np.ones((len(u), 1))
    bounds = np.block([[powers, -error], [-powers, -error]])
    cost = np.append(np.zeros(DEGREE + 1), 1)
    solved = optimize.linprog(cost, A_ub=bounds, b_ub=np.append(z, -z), bounds=(None, None), method="highs")
    coefficients = solved.x[:-1] / np.sqrt(3)
    roots = 1 + np.roots(coefficients[::-1])
    (real,) = roots[roots.imag == 0].real
    first, second = sorted(roots[roots.imag > 0], key=lambda root: -root.real)
    return np.array((-coefficients[-1], real, first.real, first.imag**2, second.real, second.imag**2))


def describe(bits: int) -> str:
    """The error of the noise of `bits` bits, in standard deviations of the normal distribution."""
    u = positive(bits)
    z = quantile(u)
    noise = reference.shape_noise(torch.from_numpy(u.astype(np.float32)), reference.GAUSSIAN).double().numpy()
    noise *= np.sqrt(3)
    power = float((noise**2).mean())
    return (
        f"{bits} bits: largest error {np.abs(noise - z).max():.2e} standard deviations, of the probability "
        f"{np.abs(special.ndtr(noise) - (1 + u) / 2).max():.2e}; largest value {noise[-1]:.4f} (exact: {z[-1]:.4f}); "
        f"root mean square {power**0.5:.6f}; kurtosis {(noise**4).mean() / power**2:.4f}; "
        f"{'increasing' if (np.diff(noise) > 0).all() else 'NOT increasing'}"
    )


def main() -> int:
    fitted = fit().astype(np.float32)
    print("fitted:", ", ".join(np.format_float_positional(c, unique=True) for c in fitted))
    print("in use:", reference.GAUSSIAN_FACTORS)
    print(describe(16), describe(23), sep="\n")
    return 0 if np.allclose(fitted, reference.GAUSSIAN_FACTORS, rtol=1e-3) else 1


if __name__ == "__main__":
    sys.exit(main())
