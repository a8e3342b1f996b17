"""Noisy embeddings: a module for plain tables, and a hook for embeddings that keep their own forward."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from neft_kernels.models import sharding
from neft_kernels.models.model_noise import ModelNoise
from neft_kernels.models.noise import EmbeddingNoise
from neft_kernels.models.options import AlphaSchedule, NoiseOptions
from neft_kernels.models.passes import parameters_of_forward
from neft_kernels.models.strength import CleanEmbeddings, readable_table
from neft_kernels.models.switch import begin_pass
from neft_kernels.ops.autograd import add_noise, noisy_embedding

__all__ = ["NEFTuneEmbedding", "NoiseHook", "is_unreadable"]

#: The arguments of :func:`neft_kernels.noise_magnitude` that a noisy embedding takes beside the ids.
SEQUENCES = frozenset(("attention_mask", "position_ids", "cu_seq_lens", "labels"))


class NEFTuneEmbedding(nn.Embedding):
    """``nn.Embedding`` whose forward in training adds NEFTune's noise, in the same kernel as the look-up.

    In evaluation mode, under ``torch.no_grad()``, and with ``alpha=0`` it is the plain embedding. The seed is drawn from
    PyTorch's default generator of the weight's device, so ``torch.manual_seed`` reproduces a run.

    Args:
        num_embeddings, embedding_dim, padding_idx, args, kwargs: as in ``nn.Embedding``. ``max_norm`` is not supported.
        alpha, and the options in kwargs: as in :func:`neft_kernels.replace_embeddings`, without ``argument_names`` and
            ``symmetric``. If a ``sequence_group`` is set, the masks given to forward may be those of the rank's part or those
            of the whole sequences.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value. The message names it.
    """

    #: None after :func:`neft_kernels.restore_embeddings`.
    noise: EmbeddingNoise | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: None = None,
        *args: Any,
        alpha: float | Callable[[int], float] = 5.0,
        **kwargs: Any,
    ) -> None:
        if max_norm is not None:
            raise ValueError("max_norm is not supported: it rewrites the weight in forward")
        # Its forward has names of its own, and is not the model, whose batch is doubled.
        known = NoiseOptions.__dataclass_fields__.keys() - {"argument_names", "symmetric"}
        options = {name: kwargs.pop(name) for name in known if name in kwargs}
        model = ModelNoise(NoiseOptions(**options), AlphaSchedule(alpha))
        super().__init__(num_embeddings, embedding_dim, padding_idx, None, *args, **kwargs)
        self.noise = self.built_in_noise = EmbeddingNoise(model)

    def forward(self, input: Tensor, **sequences: Tensor | None) -> Tensor:
        """``[..., L]`` ids to ``[..., L, embedding_dim]``.

        Args:
            input: token ids, any integer dtype.
            sequences: ``attention_mask``, ``position_ids``, ``cu_seq_lens`` or ``labels``, as in
                :func:`neft_kernels.noise_magnitude`. Without any, those that the model around this module was called with, if
                :func:`neft_kernels.replace_embeddings` made it noisy.
        """
        noise = self.noise
        plain = functools.partial(super().forward, input)
        if noise is None or input.ndim == 0:
            return plain()
        options = noise.model_noise.options
        part = None if options.sequence_group is None else sharding.part_of_rank(input, options)
        weight = self.weight  # nn.Module looks it up in Python
        # Fused, each run of tokens would have a gradient of the size of the table.
        is_fused = not is_unreadable(weight) and (part is None or part.is_one_run(input))
        if not torch.compiler.is_compiling():
            noise.was_fused = is_fused
        if not is_fused:
            return self._forward_in_two_steps(noise, plain, input, sequences)
        if not begin_pass(noise, self, input):
            return plain()
        op = functools.partial(
            noisy_embedding,
            input,
            weight,
            first_token=0 if part is None else part.pieces[0][0],
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        return noise.add(op, CleanEmbeddings(input, weight, part=part), sequences)

    def _forward_in_two_steps(
        self, noise: EmbeddingNoise, plain: Callable[[], Tensor], input: Tensor, sequences: dict[str, Tensor | None]
    ) -> Tensor:
        """The plain forward, then the noise on its output: for a table that is quantised or sharded."""
        ids = input.full_tensor() if sharding.is_dtensor(input) else input  # type: ignore[attr-defined]
        if not begin_pass(noise, self, ids):
            return plain()
        return _add_to(plain(), self, noise, ids, sharding.tensor_parallel_groups(self), sequences)

    def __prepare_scriptable__(self) -> nn.Embedding:
        """What torch.jit.script compiles in place of this module."""
        if self.noise is not None:
            raise RuntimeError(
                "torch.jit.script cannot compile a noisy embedding; call restore_embeddings(model) first if "
                "replace_embeddings() made it noisy, copy the weight into an nn.Embedding if it was built noisy, or use "
                "torch.compile or torch.export"
            )
        plain = nn.Embedding.__new__(nn.Embedding)
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name != "built_in_noise"})
        return plain


def is_unreadable(weight: Tensor) -> bool:
    """Whether the kernels cannot read `weight`: it is a DTensor, or quantised, as torchao does it to a table in place."""
    return type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight)


class NoiseHook:
    """Forward hooks that add noise to the output of an embedding that keeps its own forward."""

    def __init__(self, noise: EmbeddingNoise) -> None:
        self.noise = noise
        #: Of the call under way in each thread: the groups over which the table is sharded, and the arguments about sequences.
        self._calls: dict[int, tuple[Sequence[Any], dict[str, Tensor | None]]] = {}

    def attach(self, module: nn.Module) -> None:
        """Registers both hooks."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after, with_kwargs=True)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Takes away the arguments about sequences that :meth:`NEFTuneEmbedding.forward` has, if `module` does not know them.

        Also keeps the groups over which the table is sharded: after the forward, FSDP may have sharded it over its own again.
        """
        sequences = {name: value for name, value in kwargs.items() if name in SEQUENCES}
        if sequences and SEQUENCES.intersection(parameters_of_forward(module)):
            sequences = {}
        self._calls[_thread()] = sharding.tensor_parallel_groups(module), sequences
        return args, {name: value for name, value in kwargs.items() if name not in sequences}

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """The output with its noise."""
        noise = self.noise
        groups, sequences = self._calls.pop(_thread(), ((), {}))
        embeds = output[0] if isinstance(output, tuple) else output  # [..., L, D]
        ids: Any = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), embeds)
        if sharding.is_dtensor(ids):
            ids = ids.full_tensor()
        if embeds.ndim < 2 or not begin_pass(noise, module, ids):
            return output
        noisy = _add_to(embeds, module, noise, ids, groups, sequences)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _add_to(
    embeds: Tensor,
    module: nn.Module,
    noise: EmbeddingNoise,
    ids: Tensor,
    groups: Sequence[Any],
    sequences: dict[str, Tensor | None],
) -> Tensor:
    """The noise of `ids` on `embeds` ``[..., l, D]``, which `module` returned, and of which a rank may hold a part.

    If `ids` have another shape than the tokens in `embeds`, as with several codebooks, they say nothing about the batch.
    """

    def add(embeds: Tensor) -> Tensor:
        shape = embeds.shape[:-1]
        is_part = len(groups) == 1 and ids.shape == (*shape[:-1], shape[-1] * sharding.group_size(groups[0]))
        tokens = ids if is_part or ids.shape == shape else embeds[..., 0]
        part = sharding.part_of_rank(tokens, noise.model_noise.options)
        if is_part and ids.shape != shape:  # the output of tensor parallelism with sequence parallelism
            part = sharding.part_of_output(part, tokens.shape[-1], shape[-1], groups[0])
        op = (
            functools.partial(add_noise, embeds) if part is None else functools.partial(sharding.in_parts, part, embeds)
        )
        clean = CleanEmbeddings(tokens, readable_table(module, tokens, embeds), embeds, part, groups)
        return noise.add(op, clean, sequences)

    if sharding.is_dtensor(embeds):
        return sharding.add_to_whole(embeds, add)
    width = getattr(module, "embedding_dim", embeds.shape[-1])
    if len(groups) == 1 and embeds.shape[-1] != width:  # the output of a table that is sharded by columns
        return sharding.add_to_columns(embeds, width, groups[0], add)
    return add(embeds)
