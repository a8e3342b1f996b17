"""Every GPU kernel, small, for compute-sanitizer to watch: awkward widths, bad ids, strided rows, masks. Results are checked.

compute-sanitizer --tool memcheck python tools/sanitize_gpu.py
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from neft_kernels import add_noise, available_backends, noise_magnitude, noisy_embedding

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WIDTHS = (1, 7, 64, 129, 1000)


def tables(width: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Contiguous, transposed, and rows that begin anywhere."""
    yield torch.randn(31, width, device="cuda").to(dtype)
    yield torch.randn(width, 31, device="cuda").to(dtype).t()
    yield torch.randn(31, width + 3, device="cuda").to(dtype)[:, 1 : width + 1]


def check_backend(backend: str) -> int:
    launches = 0
    ids = torch.randint(31, (3, 21), device="cuda")
    bad = ids.clone()
    bad[1, 2], bad[2, 3] = 31, -1
    for dtype in DTYPES:
        for width in WIDTHS:
            for weight in tables(width, dtype):
                for tokens in (ids, ids.int(), ids.t(), bad):
                    for magnitude in (0.1, torch.rand(tokens.shape, device="cuda") * (tokens % 2)):
                        got = noisy_embedding(tokens, weight, magnitude, seed=5, first_token=2**33, backend=backend)
                        if tokens is not bad:
                            want = noisy_embedding(
                                tokens, weight, magnitude, seed=5, first_token=2**33, backend="reference"
                            )
                            assert torch.equal(got, want)
                        launches += 1
                assert torch.equal(
                    add_noise(weight, 0.1, seed=5, backend=backend), add_noise(weight, 0.1, seed=5, backend="reference")
                )
                launches += 1
    return launches


def check_magnitudes() -> int:
    launches = 0
    for length in (1, 5, 2048, 5000):
        mask = torch.randint(4, (3, length))
        positions = torch.arange(length) % 37
        cases: tuple[dict[str, Any], ...] = (
            {"attention_mask": mask},
            {"position_ids": positions},
            {"attention_mask": mask, "position_ids": positions},
        )
        for case in cases:
            on_gpu = {name: value.cuda() for name, value in case.items()}
            got = noise_magnitude(torch.zeros(3, length, device="cuda"), 64, 5.0, **on_gpu)
            assert isinstance(got, Tensor)
            assert torch.equal(got.cpu(), torch.as_tensor(noise_magnitude(torch.zeros(3, length), 64, 5.0, **case)))
            launches += 1
    return launches


def main() -> int:
    if not torch.cuda.is_available():
        print("tools/sanitize_gpu.py needs a GPU, and torch finds none here", file=sys.stderr)
        return 1
    backends = [each.name for each in available_backends() if "cuda" in each.devices and each.name != "reference"]
    for backend in backends:
        print(f"{backend}: {check_backend(backend)} launches as the reference has them", flush=True)
    print(f"magnitudes: {check_magnitudes()} launches as on the CPU")
    torch.cuda.synchronize()
    return 0 if backends else 1


if __name__ == "__main__":
    sys.exit(main())
