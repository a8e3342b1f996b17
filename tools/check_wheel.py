"""Does the installed wheel run its C++ kernels, with the bits of the reference? Run it by its path, outside of the checkout.

python tools/check_wheel.py
"""

import torch

import neft_kernels


def main() -> None:
    backends = {backend.name: backend for backend in neft_kernels.available_backends()}
    print(neft_kernels.__version__, "from", neft_kernels.__file__, "with", backends["cpu"].detail)
    if "cpu" not in backends["cpu"].devices:
        raise SystemExit("the extension does not run")
    ids = torch.randint(1000, (4, 33))
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        weight = torch.randn(1000, 61).to(dtype)
        results = [
            neft_kernels.noisy_embedding(ids, weight, 0.3, seed=5, stream=1, backend=each)
            for each in ("cpu", "reference")
        ]
        if not torch.equal(*results):
            raise SystemExit(f"the noise in {dtype} is another one")


if __name__ == "__main__":
    main()
