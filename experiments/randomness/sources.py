"""Noise as the package's op returns it, and known-bad noise that the tests must reject."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from neft_kernels import add_noise
from neft_kernels.ops import reference

_WORD_MASK = 0xFFFFFFFF


def bits_of(dtype: torch.dtype) -> int:
    """The noise of `dtype` takes 2**bits values."""
    return 16 if dtype.itemsize == 2 else 23


@dataclass(frozen=True)
class Source:
    """Where noise comes from: a backend of the package; None takes the one that a user gets."""

    backend: str | None = None

    def levels(
        self, shape: tuple[int, int], dtype: torch.dtype, seed: int, stream: int = 0, first_token: int = 0
    ) -> Tensor:
        """The noise of `shape` ``[T, D]`` as levels, see ``uniformity``.

        Noise of magnitude 1 on a row of zeros is u, rounded to `dtype`; the same noise on the negative of that is the rest of
        u, which needs no rounding. So two calls of the op tell all bits of u.
        """

        def noisy(embeds: Tensor) -> Tensor:
            return add_noise(embeds, 1.0, seed=seed, stream=stream, first_token=first_token, backend=self.backend)

        rounded = noisy(torch.zeros(shape, dtype=dtype))
        u = rounded.float() + noisy(-rounded).float()  # exact
        bits = bits_of(dtype)
        numerator = (u * 2.0**bits).to(torch.int32)
        assert torch.equal(numerator * 2.0**-bits, u), "more than `bits` bits"
        assert (numerator & 1).all(), "an even numerator"
        return (numerator + ((1 << bits) - 1)) >> 1


Uniform = Callable[..., Tensor]


def _three_rounds(uniform: Uniform) -> dict[str, object]:
    """Philox with 3 rounds instead of 10."""
    return {"PHILOX_ROUNDS": 3}


def _low_half_twice(uniform: Uniform) -> dict[str, object]:
    """Odd columns get the noise of the even ones before them, as if one half of a word were used twice."""

    def twice(tokens: Tensor, embedding_dim: int, *args: object) -> Tensor:
        u = uniform(tokens, embedding_dim, *args)
        u[:, 1::2] = u[:, 0 : embedding_dim - 1 : 2]
        return u

    return {"uniform": twice}


def _token_word(uniform: Uniform) -> dict[str, object]:
    """The token's high word is ignored: the noise repeats after 2**32 tokens."""
    return {"uniform": lambda tokens, *args: uniform(tokens & _WORD_MASK, *args)}


def _seed_word(uniform: Uniform) -> dict[str, object]:
    """The seed's high word is ignored."""
    return {
        "uniform": lambda tokens, width, dtype, seed, stream: uniform(tokens, width, dtype, seed & _WORD_MASK, stream)
    }


def _stream_shifts_tokens(uniform: Uniform) -> dict[str, object]:
    """The stream is added to the token: neighbouring streams have the same noise, one token apart."""
    return {"uniform": lambda tokens, width, dtype, seed, stream: uniform(tokens + stream, width, dtype, seed, 0)}


def _no_key_schedule(uniform: Uniform) -> dict[str, object]:
    """Philox whose key is not bumped from round to round."""
    return {"PHILOX_WEYL": (0, 0)}


def _stuck_bit(uniform: Uniform) -> dict[str, object]:
    """The lowest of the 16 or 23 bits is always 0."""

    def stuck(tokens: Tensor, embedding_dim: int, dtype: torch.dtype, *args: object) -> Tensor:
        bits = bits_of(dtype)
        level = ((uniform(tokens, embedding_dim, dtype, *args) * 2**bits).long() + (1 << bits) - 1) >> 1
        return ((2 * (level & ~1) + 1 - (1 << bits)) * 2.0**-bits).to(
            torch.float64 if dtype.itemsize == 8 else torch.float32
        )

    return {"uniform": stuck}


#: Known-bad generators by name, each a way to break the reference. The tests must reject all of them but those that
#: `BEYOND_STATISTICS` names.
BROKEN = {
    "three-rounds": _three_rounds,
    "no-key-schedule": _no_key_schedule,
    "low-half-twice": _low_half_twice,
    "token-high-word": _token_word,
    "seed-high-word": _seed_word,
    "stream-shifts-tokens": _stream_shifts_tokens,
    "stuck-bit": _stuck_bit,
}

#: Bad as a cipher, and good noise all the same. What keeps such an error out are known answers, not statistics.
BEYOND_STATISTICS = ("no-key-schedule",)


@contextlib.contextmanager
def broken(name: str) -> Iterator[Source]:
    """Noise of the package's reference, which is broken for as long as the context lasts."""
    with contextlib.ExitStack() as stack:
        for attribute, value in BROKEN[name](reference.uniform).items():
            stack.enter_context(mock.patch.object(reference, attribute, value))
        yield Source("reference")
