"""A plugin for axolotl, whose ``neftune_noise_alpha`` then runs on our kernels. Importing this module imports axolotl.

::

    plugins:
      - neft_kernels.integrations.axolotl.NEFTunePlugin
    neftune_noise_alpha: 5
    neft_kernels:                # optional: the options of replace_embeddings()
      scale_by: sequence
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from neft_kernels.integrations.launch import patch_this_process
from neft_kernels.integrations.trainer import patch_transformers

__all__ = ["NEFTuneArgs", "NEFTunePlugin"]


class NEFTuneArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    neft_kernels: dict[str, Any] | None = None


class NEFTunePlugin(BasePlugin):
    """Applies :func:`neft_kernels.patch_transformers` in each process that reads the configuration."""

    def register(self, cfg: dict[str, Any]) -> None:
        options = cfg.get("neft_kernels")
        if options is None:
            patch_this_process()
        else:
            patch_transformers(**options)

    def get_input_args(self) -> str:
        return "neft_kernels.integrations.axolotl.NEFTuneArgs"
