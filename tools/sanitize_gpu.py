"""Every GPU kernel, small, for compute-sanitizer to watch: awkward widths, bad ids, strided rows, masks. Results are checked.

compute-sanitizer --tool memcheck python -m tools.sanitize_gpu
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from neft_kernels import add_noise, available_backends, noise_magnitude, noisy_embedding

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WIDTHS = (1, 7, 64, 129, 1000)
KINDS_FOR_A_TABLE = 3  # of ids and magnitudes; eight in all


def tables(width: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Contiguous, transposed, and rows that begin anywhere."""
    yield torch.randn(31, width).to(dtype)
    yield torch.randn(width, 31).to(dtype).t()
    yield torch.randn(31, width + 3).to(dtype)[:, 1 : width + 1]


def on_device(table: Tensor) -> Tensor:
    """A copy that lies in memory as `table` does, with what is beside it."""
    storage = torch.empty(0, dtype=table.dtype).set_(table.untyped_storage()).cuda()
    return storage.as_strided(table.shape, table.stride(), table.storage_offset())


def check_backend(backend: str) -> int:
    """What `backend` makes of every kind of ids and magnitudes, each with some table of every type and width."""
    launches = 0
    ids = torch.randint(31, (3, 21))
    bad = ids.clone()
    bad[1, 2], bad[2, 3] = 31, -1
    of_tokens = torch.rand(ids.shape) * (ids % 2)
    # Kinds of ids and magnitudes take turns, because a compilation for each combination would take most of the time.
    magnitudes: tuple[float | Tensor, ...] = (0.1, of_tokens)
    kinds = itertools.cycle(itertools.product((ids, ids.int(), ids.t(), bad), magnitudes))
    for dtype in DTYPES:
        for width in WIDTHS:
            for weight in tables(width, dtype):
                for tokens, magnitude in itertools.islice(kinds, KINDS_FOR_A_TABLE):
                    if isinstance(magnitude, Tensor) and magnitude.shape != tokens.shape:
                        magnitude = magnitude.t()
                    on_gpu = magnitude.cuda() if isinstance(magnitude, Tensor) else magnitude
                    got = noisy_embedding(
                        tokens.cuda(), on_device(weight), on_gpu, seed=5, first_token=2**33, backend=backend
                    )
                    valid = (tokens >= 0) & (tokens < 31)
                    # On the CPU, where the sanitizer does not look: plain torch is some hundred kernels.
                    want = noisy_embedding(
                        torch.where(valid, tokens, 0), weight, magnitude, seed=5, first_token=2**33, backend="reference"
                    )
                    assert torch.equal(got.cpu()[valid], want[valid])
                    assert got.cpu()[~valid].isnan().all()
                    launches += 1
                assert torch.equal(
                    add_noise(on_device(weight), 0.1, seed=5, backend=backend).cpu(),
                    add_noise(weight, 0.1, seed=5, backend="reference"),
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
    torch.manual_seed(0)
    backends = [each.name for each in available_backends() if "cuda" in each.devices and each.name != "reference"]
    for backend in backends:
        print(f"{backend}: {check_backend(backend)} launches as the reference has them", flush=True)
    print(f"magnitudes: {check_magnitudes()} launches as on the CPU", flush=True)
    torch.cuda.synchronize()
    missing = {"triton", "cuda"} - set(backends)
    if missing:
        print(f"not checked, because it cannot run here: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
