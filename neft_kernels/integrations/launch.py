"""``neft-kernels run COMMAND``: any command with :func:`neft_kernels.patch_transformers` in every process that it starts.

A folder with a ``sitecustomize.py`` goes in front of PYTHONPATH, which child processes inherit. Python runs that file when it
starts. The command then replaces this process, so that its exit code and its signals are its own.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from neft_kernels.models.options import NoiseOptions
from neft_kernels.ops.backends import BACKENDS, logger
from neft_kernels.ops.magnitude import NOISE_ON, SCALES
from neft_kernels.ops.reference import NOISE_KINDS

__all__ = ["add_arguments", "patch_this_process", "run"]

STARTUP = Path(__file__).parent / "startup"
#: The variable that carries the options of patch_transformers, as JSON.
OPTIONS = "NEFT_KERNELS_RUN"

CANNOT_RUN, NOT_FOUND = 126, 127  # the exit codes of a shell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what may follow ``neft-kernels run``."""
    options = parser.add_argument_group("options, as those of replace_embeddings()", argument_default=argparse.SUPPRESS)
    options.add_argument("--scale-by", choices=SCALES)
    options.add_argument("--noise-on", choices=NOISE_ON)
    options.add_argument("--noise", choices=NOISE_KINDS)
    options.add_argument("--symmetric", action="store_true")
    options.add_argument("--stream", type=int)
    options.add_argument("--backend", choices=BACKENDS)
    options.add_argument("--under-no-grad", action="store_true")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="the command and its arguments; -- may stand before it"
    )


def run(parser: argparse.ArgumentParser, arguments: dict) -> int:
    """Replaces this process by the command. Returns an exit code only if that is not possible."""
    command = arguments.pop("command")
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        parser.error("the command is missing, for example: neft-kernels run axolotl train config.yaml")
    try:
        NoiseOptions(**arguments)
    except ValueError as error:
        parser.error(str(error))
    paths = (str(STARTUP), os.environ.get("PYTHONPATH"))
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), OPTIONS: json.dumps(arguments)}
    for ignored_by_python in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored_by_python, signal.SIG_DFL)  # or the command would ignore them too
    try:
        os.execvpe(command[0], command, os.environ | variables)
    except OSError as error:
        print(f"{parser.prog}: cannot run {command[0]!r}: {error.strerror}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_RUN


def patch_this_process() -> None:
    """Applies patch_transformers with the options of the launcher. Called as soon as ``transformers.trainer`` is imported."""
    from neft_kernels.integrations.trainer import patch_transformers

    options = json.loads(os.environ.get(OPTIONS, "{}"))
    patch_transformers(**options)
    logger.info("neft-kernels run: neftune_noise_alpha is that of neft_kernels in process %s, %s", os.getpid(), options)
