"""A batch to train a tiny model of any model type on, and what its output holds."""

import inspect
import math
import re
from typing import Any

import torch
from torch import nn

from helpers.architectures import BATCH, FIRST_ID, IMAGE, LENGTH, PADDING, POSITIONS, VOCABULARY


def batch(model: nn.Module) -> dict[str, Any]:
    """Arguments of one training step, of the language part alone where the model allows it. Its first row has padding."""
    parameters = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    ids, decoder_ids = torch.randint(FIRST_ID, VOCABULARY, (2, BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, -PADDING:] = 0
    ids = ids * mask
    given = {"decoder_input_ids": decoder_ids}
    if "input_ids" in parameters:  # else a mask would be that of the sound or the image
        given |= {"input_ids": ids, "attention_mask": mask}
    if re.search("LM|Generation|Seq2Seq", type(model).__name__):
        given["labels"] = decoder_ids if "decoder_input_ids" in parameters else ids.masked_fill(mask == 0, -100)
    given = {name: value for name, value in given.items() if name in parameters}
    more = INPUTS.get(model.config.model_type, {})
    given |= more(model.config) if callable(more) else more
    return {name: value for name, value in given.items() if value is not None}


def _numbers(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, BATCH * math.prod(shape)).view(BATCH, *shape)


def _codes(*shape: int) -> torch.Tensor:
    """Ids in several codebooks."""
    return torch.arange(math.prod(shape)).view(shape) % 50 + 3


_PIXELS = {"pixel_values": _numbers(3, IMAGE, IMAGE)}
_VIDEO = _numbers(2, 3, IMAGE, IMAGE)
_FEATURES = {"input_features": _numbers(128, 64)}
_WAVE = {"input_values": _numbers(4000)}
_BOXES = torch.tensor([1, 2, 8, 9]).expand(BATCH, LENGTH, 4)
_CODEBOOKS = {"decoder_input_ids": _codes(BATCH * 4, LENGTH), "labels": None}
_NO_LABELS = {"labels": None}
_QUERY = {"qformer_input_ids": torch.full((BATCH, 5), FIRST_ID)}

#: By model type: what a batch of text lacks, or has too much (None); also as a function of the configuration.
INPUTS: dict[str, Any] = {
    **dict.fromkeys(("aimv2", "align", "altclip", "blip", "bridgetower", "chinese_clip", "clip", "clipseg"), _PIXELS),
    **dict.fromkeys(
        ("git", "metaclip_2", "siglip", "vilt", "vision-encoder-decoder", "vision-text-dual-encoder"), _PIXELS
    ),
    "clap": {"input_features": _numbers(1, 1001, 64), "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool)},
    "pe_audio": {"input_values": torch.ones(BATCH, 1, 1920 * 4)},
    "xclip": {"pixel_values": _VIDEO},
    **dict.fromkeys(("moonshine", "moonshine_streaming", "speech-encoder-decoder", "speecht5"), _WAVE),
    **dict.fromkeys(("canary", "cohere_asr"), _FEATURES),
    **dict.fromkeys(("gradium_phonon_tts", "pocket_tts"), _NO_LABELS),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _CODEBOOKS),
    # The language model of these three is an OPT here, which has no encoder.
    "blip-2": {**_PIXELS, "decoder_input_ids": None},
    "instructblip": {**_PIXELS, **_QUERY, "decoder_input_ids": None},
    "instructblipvideo": {"pixel_values": _VIDEO, **_QUERY, "decoder_input_ids": None},
    "bros": {"bbox": _BOXES},
    "csm": {"input_ids": _codes(BATCH, LENGTH, 32), "labels": None},
    "idefics": {"pixel_values": _numbers(1, 3, IMAGE, IMAGE), "image_attention_mask": torch.ones(BATCH, LENGTH, 1)},
    "kosmos-2": lambda config: {
        **_PIXELS,
        "image_embeds_position_mask": (torch.arange(LENGTH) < config.latent_query_num).expand(BATCH, LENGTH),
    },
    "kyutai_speech_to_text": {"input_ids": _codes(BATCH, LENGTH, 33)},
    "lxmert": lambda config: {
        "visual_feats": torch.ones(BATCH, 3, config.visual_feat_dim),
        "visual_pos": torch.ones(BATCH, 3, config.visual_pos_dim),
        "labels": None,
    },
    "molmo2": {"mm_token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.long)},
    "pi0": lambda config: {
        "state": torch.ones(BATCH, config.max_state_dim),
        "actions": torch.ones(BATCH, config.chunk_size, config.max_action_dim),
        "pixel_values": _numbers(1, 3, IMAGE, IMAGE),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
    },
    "pix2struct": lambda config: {
        "flattened_patches": torch.ones(BATCH, 6, config.vision_config.patch_embed_hidden_size + 2)
    },
    "pp_formulanet": {**_PIXELS, "input_ids": None, "attention_mask": None},
    "siglip2": {
        "pixel_values": torch.ones(BATCH, 4, 768),
        "pixel_attention_mask": torch.ones(BATCH, 4),
        "spatial_shapes": torch.tensor([[2, 2]] * BATCH),
    },
    "speech_to_text": {"input_features": _numbers(64, 80)},
    "splinter": dict.fromkeys(
        ("question_positions", "start_positions", "end_positions"), torch.ones(BATCH, 1, dtype=torch.long)
    ),
    "udop": {"bbox": _BOXES / 10},
    "videoprism": {"pixel_values_videos": _VIDEO},
    "voxtral_realtime": {"input_features": _numbers(128, 8 * LENGTH)},
    "whisper": {"input_features": _numbers(80, 2 * POSITIONS)},
}


def floats(output: Any) -> list[torch.Tensor]:
    """All floating-point tensors in a model's output."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for part in parts for tensor in floats(part)]


def loss(output: Any) -> torch.Tensor:
    """The model's own loss, or for want of one a projection of its outputs."""
    own = output.get("loss") if isinstance(output, dict) else None
    if own is not None:
        return own
    outputs = (each.float() for each in floats(output) if each.requires_grad)
    return sum((each * torch.linspace(-1, 1, each.numel()).view_as(each)).mean() for each in outputs)
