"""Lays the ops out as a repository for Hugging Face's `kernels` package, which loads kernels from the Hub or from a folder.

    python -m tools.hub_kernel FOLDER [WHEEL ...]

The repository has one folder per variant in ``build/``. ``torch-cuda``, ``torch-rocm`` and ``torch-xpu`` are pure Python and
run Triton, ``torch-cpu`` runs plain torch, and ``torch-stable-abi210-cpu-*`` has the C++ extension, which is taken from the
CPU wheels that are given, or else from this checkout. Each variant is a copy of ``neft_kernels/ops`` and has its ops in a
namespace of its own, ``torch.ops.<id>``, because the namespace is the name under which the package is imported.

Nothing is uploaded. A person who may write to the repository on the Hub uploads the folder.
"""

import argparse
import base64
import hashlib
import json
import platform
import re
import shutil
import zipfile
from pathlib import Path

from tools.release import ROOT, version

OPS = ROOT / "neft_kernels" / "ops"
NAME = "neft-kernels"
#: By convention 0 until the first stable release.
VERSION = int(version().partition(".")[0])
#: Variants without an extension, and their backends.
NOARCH = {"torch-cuda": "cuda", "torch-rocm": "rocm", "torch-xpu": "xpu", "torch-cpu": "cpu"}
EXTENSION = "_C_cpu.abi3.so"
STABLE_ABI = "210"  # torch 2.10, as in setup.py

INIT = """

from . import layers

__all__ += ["layers"]
"""

#: For versions of `kernels` that expect a package inside the variant.
OLD_INIT = '''"""The package that lies one folder above, for old versions of the kernels package."""

import importlib.util
import json
import sys
from pathlib import Path

_variant = Path(__file__).parent.parent
_id = json.loads((_variant / "metadata.json").read_text())["id"]
if _id not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_id, _variant / "__init__.py")
    sys.modules[_id] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_id])
__all__ = sys.modules[_id].__all__
globals().update({_name: getattr(sys.modules[_id], _name) for _name in __all__})
'''

CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernel
---

# neft_kernels

Noisy embeddings (NEFTune, arXiv 2310.05914) in one fused kernel, bit for bit the same on every backend.

```python
from kernels import get_kernel

neft = get_kernel("OWNER/neft-kernels", version={version}, trust_remote_code=True)
magnitude = neft.noise_magnitude(input_ids, embedding_dim=weight.shape[1], alpha=5.0, attention_mask=attention_mask)
embeds = neft.noisy_embedding(input_ids, weight, magnitude)
```

`neft.layers.NEFTuneEmbedding` is a layer for `kernelize`. The Python package of the same name, version {package}, makes the
embeddings of a whole model noisy.
"""


def lay_out(folder: Path, extensions: dict[str, bytes], number: int = VERSION) -> None:
    """Writes the repository to `folder`, which must not exist.

    Args:
        folder: the repository.
        extensions: the CPU extensions by machine, such as "x86_64".
        number: the kernel's version.
    """
    for variant, backend in NOARCH.items():
        write_variant(folder / "build" / variant, backend, number, {})
    for machine, extension in extensions.items():
        variant = f"torch-stable-abi{STABLE_ABI}-cpu-{machine}-linux"
        write_variant(folder / "build" / variant, "cpu", number, {EXTENSION: extension})
    (folder / "README.md").write_text(CARD.replace("{version}", str(number)).replace("{package}", version()))
    shutil.copy(ROOT / "LICENSE", folder)


def write_variant(folder: Path, backend: str, number: int, binaries: dict[str, bytes]) -> None:
    files = {path.name: path.read_bytes() for path in OPS.glob("*.py")} | binaries
    files["__init__.py"] += INIT.encode()
    files["layers.py"] = (ROOT / "tools" / "hub" / "layers.py").read_bytes()
    files[f"{NAME.replace('-', '_')}/__init__.py"] = OLD_INIT.encode()
    digests = {name: hashlib.sha256(content) for name, content in sorted(files.items())}
    content = hashlib.sha256(f"{number} {backend}".encode() + b"".join(each.digest() for each in digests.values()))
    metadata = {
        "name": NAME,
        "id": f"_neft_kernels_{backend}_{content.hexdigest()[:12]}",
        "version": number,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(each.digest()).decode() for name, each in digests.items()},
        },
    }
    files["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def extensions_in(wheels: list[Path]) -> dict[str, bytes]:
    """The CPU extensions of `wheels` by machine."""
    found = {}
    for wheel in wheels:
        machine = re.search(r"_(x86_64|aarch64)\.whl$", wheel.name)
        if machine is None:
            raise SystemExit(f"{wheel.name} is not a wheel for Linux on x86_64 or aarch64")
        with zipfile.ZipFile(wheel) as archive:
            found[machine.group(1)] = archive.read(f"neft_kernels/ops/{EXTENSION}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new folder for the repository")
    parser.add_argument("wheels", type=Path, nargs="*", help="CPU wheels, one for each machine")
    parser.add_argument("--version", type=int, default=VERSION, help="of the kernel; default: %(default)s")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists")
    built = OPS / EXTENSION
    here = {platform.machine(): built.read_bytes()} if built.exists() else {}
    lay_out(options.folder, extensions_in(options.wheels) if options.wheels else here, options.version)
    print("\n".join(sorted(path.name for path in (options.folder / "build").iterdir())))


if __name__ == "__main__":
    main()
