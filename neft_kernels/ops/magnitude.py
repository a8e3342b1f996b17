"""How much noise each token gets: ``alpha / sqrt(L * d)`` (Jain et al. 2023, arXiv 2310.05914), for the right ``L``."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .backends import automatic_backend
from .checks import broadcasts, check_alpha, check_choice, check_number
from .registration import OVERLOADS, kernel_of

__all__ = ["NOISE_ON", "SCALES", "noise_magnitude"]

SCALES = ("sequence", "batch", "rms")
NOISE_ON = ("all", "prompt", "completion")
IGNORED_LABEL = -100  # of torch.nn.functional.cross_entropy, and so of every collator


def noise_magnitude(
    input_ids: Tensor,
    embedding_dim: int,
    alpha: float | Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    labels: Tensor | None = None,
    scale_by: str = "sequence",
    rms: float | None = None,
    noise_on: str = "all",
    backend: str | None = None,
) -> float | Tensor:
    """NEFTune's noise magnitude, ``alpha / sqrt(L * embedding_dim)``, for every token.

    Args:
        input_ids: ``[L]`` or ``[..., L]``; only its shape and device count. A 0-D id is no sequence and gets no noise.
        embedding_dim: ``d``, the width of the embedding.
        alpha: NEFTune's noise scale, >= 0; 5 to 15 in the paper. A tensor of one float64 element makes the result a tensor
            too, and is not looked at: for schedules inside compiled graphs.
        attention_mask: shape of `input_ids`; 0 where a token is padding. Values from 1 to ``L`` number the sequences
            that are packed into a row, as some packing collators have it.
        position_ids: ``[..., L]``, broadcastable to `input_ids`. Beside a mask a new sequence begins where the position
            decreases or is 0. Without a mask it begins wherever the position does not follow on the one before it, and a
            sequence of one token at position 1 is padding, as transformers numbers it on the left.
        cu_seq_lens: ``[N + 1]``, the cumulative lengths of the sequences that are packed into the only row of
            `input_ids`, beginning with 0. Tokens after the last one are padding. So are sequences of one token at the end of a
            row, by boundaries without a mask or by position, because that is what padding looks like in a packed batch.
        scale_by: "sequence": ``L`` is the true length of the token's own sequence, and padding gets no noise, as in the
            paper's training code. "batch": ``L`` is ``input_ids.shape[-1]``, noise everywhere, as in the Hugging Face hook;
            the masks are ignored. "rms": ``alpha * sqrt(3) * rms``, whatever the length, and padding gets no noise. The root
            mean square of the noise is then `alpha` times that of the embeddings.
        rms: the root mean square of the embeddings, for ``scale_by="rms"`` alone.
        labels: shape of `input_ids`, -100 for what is not learned; tells the prompt from the completion.
        noise_on: "all" tokens, or only those of the "prompt" (whose label is -100) or of the "completion"; the lengths
            stay those of the whole sequences.
        backend: that of :func:`noisy_embedding`; "triton" and "cpu" compute the magnitudes in one kernel, the others in plain
            torch, with the same result.

    Returns:
        A number where one holds for all tokens, else float32 of the shape of `input_ids`. Both are computed in float64,
        so a mask of ones gives exactly what no mask gives. Nothing is read back from the device.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value; the message names it.
    """
    check_choice("scale_by", scale_by, SCALES)
    check_choice("noise_on", noise_on, NOISE_ON)
    if not isinstance(alpha, Tensor):
        check_alpha(alpha)
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor, not {type(input_ids).__name__}")
    if not isinstance(embedding_dim, (int, torch.SymInt)):
        raise TypeError(f"embedding_dim must be an int, not {type(embedding_dim).__name__}")
    if input_ids.ndim == 0 or input_ids.numel() == 0:
        return 0.0
    if embedding_dim < 1:
        raise ValueError(f"embedding_dim must be at least 1, not {embedding_dim}")
    if (rms is None) == (scale_by == "rms"):
        raise ValueError('rms, the root mean square of the embeddings, belongs to scale_by="rms": give both or neither')
    if rms is not None:
        check_number("rms", rms)
        # Tokens that count have the magnitude 1 where alpha and every length are as good as 1.
        counts = noise_magnitude(
            input_ids,
            1,
            1.0,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seq_lens=cu_seq_lens,
            labels=labels,
            noise_on=noise_on,
            backend=backend,
        )
        magnitude = alpha * (math.sqrt(3) * rms)
        if not isinstance(counts, Tensor):
            return magnitude.to(torch.float32) if isinstance(magnitude, Tensor) else magnitude
        return ((counts > 0).to(wide_dtype(input_ids.device)) * magnitude).to(torch.float32)
    if scale_by == "batch" or (attention_mask is None and position_ids is None and cu_seq_lens is None):
        magnitude = _magnitude_of_length(alpha, input_ids.shape[-1], embedding_dim, input_ids.device)
    else:
        _check_masks(input_ids, attention_mask, position_ids, cu_seq_lens)
        kernel = _kernel(alpha, input_ids, attention_mask, position_ids, cu_seq_lens, backend)
        if kernel is None:
            if attention_mask is not None and position_ids is not None and cu_seq_lens is None:
                position_ids = _without_positions_of_padding(attention_mask, position_ids)
                attention_mask = _without_packed_padding(attention_mask, position_ids)
            magnitude = _magnitude_by_sequence(
                alpha, input_ids, embedding_dim, attention_mask, position_ids, cu_seq_lens
            )
        else:
            arguments = (
                _as_contiguous_int64(attention_mask, input_ids.shape),
                _as_contiguous_int64(position_ids, input_ids.shape),
                alpha,
                embedding_dim,
            )
            magnitude = kernel_of(kernel, arguments)(*arguments)
    if noise_on == "all":
        return magnitude
    if labels is None:
        raise ValueError(
            f"noise_on={noise_on!r} needs labels of the shape of input_ids, but there are none; a Trainer that computes the "
            "loss itself takes them out of the batch"
        )
    _check_device("labels", labels, input_ids)
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels must have the shape of input_ids, {list(input_ids.shape)}, not {list(labels.shape)}")
    chosen = (labels == IGNORED_LABEL) == (noise_on == "prompt")
    return (chosen.to(wide_dtype(input_ids.device)) * magnitude).to(torch.float32)


def _magnitude_by_sequence(
    alpha: float | Tensor,
    input_ids: Tensor,
    embedding_dim: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
) -> Tensor:
    # Every token's sequence, by number within its row, and whether it belongs to one at all.
    if cu_seq_lens is not None:
        tokens = torch.arange(input_ids.shape[-1], device=input_ids.device)
        sequence = torch.bucketize(tokens, cu_seq_lens[1:].to(tokens.device), right=True).expand(input_ids.shape)
        present = sequence < cu_seq_lens.numel() - 1
    elif position_ids is not None:
        positions = position_ids.expand(input_ids.shape)
        begins = _begins(positions, has_mask=attention_mask is not None)
        sequence = begins.cumsum(-1) - begins[..., :1].to(torch.int64)
        present = torch.ones_like(sequence, dtype=torch.bool)
    else:
        assert attention_mask is not None
        length = input_ids.shape[-1]
        sequence = attention_mask.to(torch.int64).clamp(0, length)
        present = sequence > 0
    if attention_mask is not None:
        present = present & (attention_mask != 0)

    counts_shape = (*input_ids.shape[:-1], input_ids.shape[-1] + 1)
    tokens_of_sequence = torch.zeros(counts_shape, dtype=torch.int64, device=input_ids.device)
    tokens_of_sequence = tokens_of_sequence.scatter_add(-1, sequence, present.to(torch.int64))
    length_of_token = tokens_of_sequence.gather(-1, sequence)
    if attention_mask is None and input_ids.shape[-1] > 1:
        # Collators that pack pad positions with 0 and give no mask: each padding token at the end looks like a sequence.
        padding = (length_of_token <= 1).flip(-1).cumprod(-1).flip(-1)
        present = present & (padding == 0)
        if cu_seq_lens is None:
            # transformers gives padding on the left the position 1, so each token of it looks like a sequence of one.
            assert position_ids is not None
            present = present & ((length_of_token != 1) | (position_ids != 1))
    magnitude = alpha / torch.sqrt(length_of_token.clamp(min=1).to(wide_dtype(input_ids.device)) * embedding_dim)
    return torch.where(present, magnitude, 0).to(torch.float32)


def _begins(positions: Tensor, has_mask: bool) -> Tensor:
    """Whether a sequence begins at each token, ``[..., L]``. The first token begins none here.

    Positions alone must follow on each other. Beside a mask, which tells padding, a jump ahead or a repeated position begins
    no sequence.
    """
    here, before = positions[..., 1:], positions[..., :-1]
    begins = (here < before) | (here == 0) if has_mask else here != before + 1
    return torch.nn.functional.pad(begins, (1, 0))


def _without_positions_of_padding(attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """`position_ids` in which padding has the position of the last token before it, or 1 for 0, and begins no sequence."""
    positions, present = position_ids.expand(attention_mask.shape), attention_mask != 0
    columns = torch.arange(positions.shape[-1], device=positions.device)
    last = torch.where(present, columns, -1).cummax(-1).values
    filling = torch.where(last < 0, 1, positions.gather(-1, last.clamp(min=0)))
    return torch.where(present, positions, torch.where(filling == 0, 1, filling))


def _without_packed_padding(attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """`attention_mask` with 0 for the padding that some packing collators give a mask of 1 and the position 0.

    It is a run of sequences of one token at the end of a row, unless padding that the mask tells stands before it.
    """
    if attention_mask.shape[-1] == 1:
        return attention_mask
    begins = _begins(position_ids.expand(attention_mask.shape), has_mask=True)[..., 1:]
    present = attention_mask != 0
    pad = torch.nn.functional.pad
    is_first = pad(begins, (1, 0), value=True) | (present.cumsum(-1) == 1)
    is_single = present & is_first & pad(begins, (0, 1), value=True)
    in_run = is_single.flip(-1).cumprod(-1).flip(-1) > 0
    after_padding = in_run & ~pad(present[..., :-1], (1, 0), value=True)
    return attention_mask * ~(in_run & ~after_padding.any(-1, keepdim=True))


def _magnitude_of_length(
    alpha: float | Tensor, length: int, embedding_dim: int, device: torch.device
) -> float | Tensor:
    """``alpha / sqrt(length * embedding_dim)`` for all tokens; nothing is checked."""
    if not isinstance(alpha, Tensor) and not torch.compiler.is_compiling():
        return alpha / math.sqrt(length * embedding_dim)
    # As a number it would be a constant of the compiled graph, which would be compiled again for each new length.
    length_tensor = torch.full((), length * embedding_dim, dtype=wide_dtype(device), device=device)
    return (alpha / length_tensor.sqrt()).to(torch.float32)


def _check_masks(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cu_seq_lens: Tensor | None
) -> None:
    shape = list(input_ids.shape)
    _check_device("attention_mask", attention_mask, input_ids)
    _check_device("position_ids", position_ids, input_ids)
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {shape}, not {list(attention_mask.shape)}")
    if cu_seq_lens is not None:
        if cu_seq_lens.ndim != 1 or cu_seq_lens.numel() < 2:
            raise ValueError(f"cu_seq_lens must have shape [N + 1], not {list(cu_seq_lens.shape)}")
        if input_ids.numel() != input_ids.shape[-1]:
            raise ValueError(f"cu_seq_lens needs input_ids of one row, not of shape {shape}")
        if cu_seq_lens.numel() > input_ids.shape[-1] + 1:
            raise ValueError(
                f"cu_seq_lens names {cu_seq_lens.numel() - 1} sequences, more than input_ids has tokens, {shape[-1]}"
            )
    elif position_ids is not None and (
        position_ids.shape[-1:] != input_ids.shape[-1:] or not broadcasts(position_ids.shape, input_ids.shape)
    ):
        raise ValueError(f"position_ids must broadcast to input_ids, {shape}, but has shape {list(position_ids.shape)}")


def _check_device(name: str, values: Tensor | None, input_ids: Tensor) -> None:
    if values is not None and values.device != input_ids.device:
        raise ValueError(f"{name} is on {values.device}, but input_ids is on {input_ids.device}; move it")


def _kernel(
    alpha: float | Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    backend: str | None,
) -> Callable[..., Tensor] | None:
    """The op that computes the magnitudes in one kernel. None: there is no kernel, or a compiler fuses the plain code."""
    if isinstance(alpha, Tensor) or cu_seq_lens is not None or torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    if any(each is not None and each.is_floating_point() for each in (attention_mask, position_ids)):
        return None
    return magnitude_kernel(input_ids.device.type, backend)


def magnitude_kernel(device_type: str, backend: str | None) -> Callable[..., Tensor] | None:
    """The op ``token_magnitude`` of `backend`, or of the best backend. None if it has none or cannot run here."""
    name = automatic_backend(device_type, backend)
    return None if name is None else OVERLOADS["token_magnitude"].get(name)


def _as_contiguous_int64(values: Tensor | None, shape: torch.Size) -> Tensor | None:
    if values is None or (values.dtype == torch.int64 and values.shape == shape and values.is_contiguous()):
        return values
    return values.to(torch.int64).expand(shape).contiguous()


def wide_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
