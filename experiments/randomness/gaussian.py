"""Fits the polynomial of gaussian noise, and says how far that noise is from the normal distribution.

    python -m experiments.randomness.gaussian

The contract, in :mod:`neft_kernels.ops.reference`, makes gaussian noise of a uniform ``u`` as ``u * p(w)``, where ``w`` is
about ``-log2(1 - u**2) / 32``. The exact quantile is ``ndtri((1 + u) / 2)``. The coefficients of ``p`` minimise the largest
difference over all levels of 16 bits and a sample of those of 23 bits: a linear program. They are then divided by sqrt(3).
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
    """The coefficients of ``p``, lowest power first."""
    fine = positive(23)
    near_one = 1 - np.exp2(-np.linspace(0, 23, SAMPLED // 2))
    places = np.append(np.linspace(0, len(fine) - 1, SAMPLED // 2).astype(int), np.searchsorted(fine, near_one))
    u = np.concatenate((positive(16)[::4], positive(16)[-512:], np.unique(fine[np.minimum(places, len(fine) - 1)])))
    z = quantile(u)
    w = reference._octaves(torch.from_numpy(u.astype(np.float32))).double().numpy()
    powers = np.stack([w**power * u for power in range(DEGREE + 1)], axis=1)
    error = np.ones((len(u), 1))
    bounds = np.block([[powers, -error], [-powers, -error]])
    cost = np.append(np.zeros(DEGREE + 1), 1)
    solved = optimize.linprog(cost, A_ub=bounds, b_ub=np.append(z, -z), bounds=(None, None), method="highs")
    return solved.x[:-1] / np.sqrt(3)


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
    print("in use:", reference.GAUSSIAN_COEFFICIENTS)
    print(describe(16), describe(23), sep="\n")
    return 0 if np.allclose(fitted, reference.GAUSSIAN_COEFFICIENTS, rtol=1e-3) else 1


if __name__ == "__main__":
    sys.exit(main())
