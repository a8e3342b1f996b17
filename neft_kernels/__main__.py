"""``python -m neft_kernels``: what can run here, which backend is chosen for which device, and why not the others."""

import platform
import sys

import torch

import neft_kernels


def main() -> int:
    print(f"neft_kernels {neft_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for backend in neft_kernels.available_backends():
        mark = "+" if backend.devices else "-"
        chosen = f", chosen for {', '.join(backend.chosen_for)} tensors" if backend.chosen_for else ""
        print(f"  {mark} {backend.name:<10} {backend.detail}{chosen}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
