"""The noise in the embeddings of a run, measured apart from neft_kernels."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["NoiseProbe", "document_lengths"]


class NoiseProbe(TrainerCallback):
    """Measures the noise in the first update's embeddings, and what it should be with each document's own length."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self._inputs: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        self._handles = [
            model.register_forward_pre_hook(self._note, with_kwargs=True),
            model.get_input_embeddings().register_forward_hook(self._measure),  # after the Trainer's own hook
        ]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        self._inputs = kwargs

    def _measure(self, module: nn.Embedding, args: tuple[Tensor], output: Tensor) -> None:
        rows = F.embedding(args[0], module.weight).detach()
        noise = output.detach() - rows
        lengths = document_lengths(self._inputs.get("attention_mask"), self._inputs.get("position_ids"))  # [B, L]
        real = lengths > 0
        self.found = {
            "documents": int((1 / lengths[real]).sum().round()),
            "row_tokens": args[0].shape[-1],
            "embedding_rms": rows[real].square().mean().sqrt().item(),
            "noise_rms": noise[real].square().mean().sqrt().item(),
            "padding_noise_rms": noise[~real].square().mean().sqrt().item() if not real.all() else 0.0,
            # of alpha = 1 and L = each document's length: 1 / sqrt(3 L d), as a uniform variable's variance is a third
            "right_rms_per_alpha": (1 / (3 * lengths[real] * rows.shape[-1])).mean().sqrt().item(),
        }


def document_lengths(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """``[B, L]`` float: how long each token's document is, 0 for padding; counted here apart from neft_kernels."""
    if attention_mask is not None:
        return attention_mask * attention_mask.sum(-1, keepdim=True).float()
    assert position_ids is not None
    rows = []
    for row in position_ids:
        lengths = row[torch.nonzero(F.pad(row[1:], (0, 1)) == 0)[:, 0]] + 1
        rows.append(lengths.repeat_interleave(lengths).float())
    return torch.stack(rows)
