"""``python -m neft_kernels`` or ``neft-kernels``: what can run here, which backend is chosen for which device, and why.

``neft-kernels run COMMAND`` runs a command with :func:`neft_kernels.patch_transformers` in every process that it starts.
"""

import argparse
import platform
import sys

import torch

import neft_kernels
from neft_kernels.integrations import launch
from neft_kernels.ops.backends import switches


def main() -> int:
    parser = argparse.ArgumentParser("neft-kernels", description="Without arguments: which backends can run here.")
    launcher = parser.add_subparsers(metavar="run").add_parser(
        "run",
        usage="%(prog)s [options] [--] command ...",
        description="Runs a command with patch_transformers() in it and in every process that it starts.",
        help="run a command with patch_transformers() in every process that it starts",
        allow_abbrev=False,
    )
    launch.add_arguments(launcher)
    arguments = vars(parser.parse_args())
    return launch.run(launcher, arguments) if "command" in arguments else show_backends()


def show_backends() -> int:
    print(f"neft_kernels {neft_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    found = neft_kernels.available_backends()
    for backend in found:
        mark = "+" if backend.devices else "-"
        chosen = f", chosen for {', '.join(backend.chosen_for)} tensors" if backend.chosen_for else ""
        print(f"  {mark} {backend.name:<10} {backend.detail}{chosen}")
    preferred = switches.backend
    if preferred is not None and preferred not in {backend.name for backend in found if backend.devices}:
        print(f"NEFT_KERNELS_BACKEND={preferred} names none that can run here", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
