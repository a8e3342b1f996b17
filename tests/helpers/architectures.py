"""A tiny model of every model type of the installed transformers that looks up token ids.

A model type's own default configuration is walked field by field, sub-configurations included, and its sizes are replaced
by small ones: :data:`SIZES`. What that rule of thumb does not know stands in :data:`EXCEPTIONS`.
"""

import dataclasses
import inspect
import re
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from helpers.architecture_limits import NOT_BUILT, REFUSED

WIDTH, HEADS, HEAD_DIM, LAYERS, EXPERTS = 64, 4, 16, 2, 4
VOCABULARY, FIRST_ID = 128, 40  # ids below are kept for special tokens
POSITIONS, IMAGE = 128, 32
BATCH, LENGTH, PADDING = 2, 25, 8  # tokens; the first row of a batch ends with padding

#: Field names, as regular expressions, and the largest value they get. The first that matches decides.
SIZES = (
    (r"type_vocab_size|max_window_layers|.*kv_shared_layers|.*nextn.*|.*feat_extract_layers", None),
    (r"(.*_)?vocab_size.*|n_words|encoder_hash_byte_group_vocab", VOCABULARY),
    (r".*(attention_heads|num_heads|n_heads?|_heads|num_key_heads|num_value_heads)", HEADS),
    (r".*(head_dim|head_size)|d_kv|dim_head|kv_channels|rotary_dim", HEAD_DIM),
    (r".*(hidden_layers|_layers|n_layer|depths?|num_.*blocks)", LAYERS),
    (r".*(routed_experts|num_experts|local_experts|n_experts)|zero_expert_num", EXPERTS),
    (r".*(experts_per_tok(en)?|top_?k|top_k_experts|moe_k)", 2),
    (r"n_group|topk_group|.*upsample_groups", 1),
    (
        r".*(hidden_sizes?|d_model|n_embd|embed_dim|emb_dim|hidden_dim|intermediate_size.*|ffn_dim|d_ff|dff|mlp_dim|proj_size"
        r"|model_dim|embedding_size|ffn_hidden_size|dim_ff|_rank|width|dim)|d_inner|mamba_d_ssm|block_multiple_of|hidden_size_.*",
        WIDTH,
    ),
    (r".*max_position.*|n_positions|max_.*_positions|context_length", POSITIONS),
    (r"image_size", IMAGE),
)
#: Sizes that are None by default and that a model cannot do without.
REQUIRED = {"head_dim": HEAD_DIM, "num_experts_per_tok": 2, "n_routed_experts": EXPERTS}
SPECIAL_TOKEN = r".*(token_ids?|token_index|_(start|end|newline|patch|pad|bos|eos)_id|(bos|eos|pad|unk|mask)_index)"

#: By model type, also of sub-configurations: fields that the sizes above get wrong or too large.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 640},  # of its EfficientNet
    "apertus1p5": {"image_token_offset": 16, "audio_token_offset": 24},  # after them the codes of the two below
    "apertus1p5_vision_tokenizer": {"codebook_size": 8},
    "wavtokenizer_encoder": {"codebook_size": 8},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"block_size": 2, "num_random_blocks": 1},  # its attention is sparse in batches longer than 7 blocks
    "blip-2": {"image_token_index": FIRST_ID - 1},
    "blt": {"num_hidden_layers": LAYERS},
    "chameleon": {"vocabulary_map": {"<image>": FIRST_ID - 1}},
    "chameleon_vqgan": {"base_channels": 32},
    "clap_audio_model": {"hidden_size": 8 * WIDTH},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cosmos3_edge_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": HEADS, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma_text": {"num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": WIDTH},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_hidden_layers": 3,
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 2 * HEAD_DIM},
    "emu3": {"vocabulary_map": {"<image>": FIRST_ID - 1, "<|extra_200|>": FIRST_ID - 2}},
    "emu3_vqgan": {"base_channels": 32, "latent_channels": 4},
    "encodec": {"num_filters": 4},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    },
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3, "pad_token_id": 0},
    "fun_asr_nano": {
        "adaptor_config": {"hidden_size": WIDTH, "intermediate_size": WIDTH // 4, "encoder_hidden_size": WIDTH}
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm5_next_text": {"index_topk": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hy_v4_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "index_topk": 16,
    },
    "instructblip": {"image_token_index": FIRST_ID - 1},
    "instructblipvideo": {"video_token_index": FIRST_ID - 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "janus_vqgan": {"base_channels": 32, "latent_channels": 32},
    "kosmos-2": {"latent_query_num": 4},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8},
    "led": {"attention_window": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "longcat_flash": {"qk_head_dim": 2 * HEAD_DIM},
    "longformer": {"attention_window": 16},
    "mamba2": {"num_heads": 8},
    "mimi": {"num_filters": 4},
    "mimo_v2_flash": {"num_key_value_heads": HEADS // 2},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "muse_spark_audio": {"hidden_sizes": [8, 8, 8, 8], "num_hidden_layers": 4},
    "nemotron": {"num_key_value_heads": HEADS},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16},
    "parakeet_encoder": {"num_mel_bins": 64},
    "perceiver": {"d_latents": WIDTH},
    "qwen2_5_omni_thinker": {"vision_start_token_id": FIRST_ID - 1},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": FIRST_ID - 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "radio": {"video_temporal_patch_size": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_embds_dim": [WIDTH // 2, WIDTH // 2],
        "axial_pos_shape": [5, LENGTH // 5],
        "attn_layers": ["local", "local"],  # it reseeds torch in every pass, for its hashes and its dropout
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    },
    "step3p5": {"sliding_window": 8},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "videoprism_vision_model": {"num_frames": 2},
    "xclip_vision_model": {"num_frames": 2},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 2 * WIDTH,
    },
}

#: Sub-configurations whose models split the rotary dimensions by time, height and width, and do not say how in their fields.
MULTIMODAL_ROTARY = {
    *("glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text", "hunyuan_vl_text", "paddleocr_vl_text"),
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"),
}

#: Kinds of auto classes, in the order of what a user would fine-tune.
TASKS = (
    *("FOR_SEQ_TO_SEQ_CAUSAL_LM", "FOR_IMAGE_TEXT_TO_TEXT", "FOR_SPEECH_SEQ_2_SEQ", "FOR_TEXT_TO_WAVEFORM"),
    *(
        "FOR_MASKED_LM",
        "FOR_CAUSAL_LM",
        "FOR_MULTIMODAL_LM",
        "FOR_PRETRAINING",
        "FOR_QUESTION_ANSWERING",
        "FOR_RETRIEVAL",
    ),
    "",  # the base model
)


def model_types() -> list[str]:
    """All model types that can be made noisy here."""
    left_out = {*NOT_BUILT, *REFUSED}
    return [each for each in CONFIG_MAPPING_NAMES if each not in left_out and model_class(each) is not None]


def model_class(model_type: str) -> type[nn.Module] | None:
    """The class that a user would fine-tune; None where the auto classes have none that takes token ids."""
    for task in TASKS:
        name = getattr(modeling_auto, "_".join(filter(None, ("MODEL", task, "MAPPING_NAMES")))).get(model_type)
        if name is not None:
            found = getattr(transformers, name if isinstance(name, str) else name[0])
            return found if any("input_ids" in each for each in inspect.signature(found.forward).parameters) else None
    return None


def build(model_type: str) -> nn.Module:
    """A tiny model in training mode, always the same."""
    torch.manual_seed(0)
    model = model_class(model_type)(tiny_config(model_type)).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0  # so that training does not show in evaluation
    return model


def tiny_config(model_type: str) -> PretrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**_fields(config_class(), special_tokens={}))
    _split_rotary_dimensions(config)
    return config


def _fields(default: PretrainedConfig, special_tokens: dict[str, int]) -> dict[str, Any]:
    """What makes a configuration like `default` tiny."""
    fields = _one_layer_of_each_kind(default)
    exceptions = EXCEPTIONS.get(default.model_type, {})
    for field in dataclasses.fields(default):
        name = field.name
        value = vars(default).get(default.attribute_map.get(name, name))
        if name in fields or name in exceptions:
            continue
        if isinstance(value, (list, tuple)) and len(value) == vars(default).get("num_hidden_layers"):
            value = field.default  # made of the number of layers, so that it makes itself again
        many = isinstance(value, (list, tuple))
        if isinstance(value, PretrainedConfig):
            fields[name] = _fields(value, special_tokens) | {"model_type": value.model_type}
        elif value is None and name in REQUIRED:
            fields[name] = REQUIRED[name]
        elif isinstance(value, bool) or not all(type(each) is int for each in (value if many else [value])):
            continue
        elif re.fullmatch(SPECIAL_TOKEN, name):
            if many:
                fields[name] = type(value)(range(FIRST_ID - len(value), FIRST_ID))
            elif value >= 0:
                fields[name] = _special_token(name, special_tokens)
        elif name == "vocab_size":
            fields[name] = VOCABULARY
        else:
            largest = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            if largest is not None:
                fields[name] = type(value)(min(each, largest) for each in value) if many else min(value, largest)
    return fields | exceptions


def _special_token(name: str, taken: dict[str, int]) -> int:
    for kind, token in (("pad", 0), ("bos", 1), ("decoder_start", 1), ("eos", 2)):
        if re.fullmatch(rf"(forced_|t2u_)?{kind}_(token_id|index)", name):
            return token
    return taken.setdefault(name, 3 + len(taken))


def _one_layer_of_each_kind(default: PretrainedConfig) -> dict[str, Any]:
    """For models whose layers differ: their lists of kinds, cut down to the first layer of each."""
    layers = vars(default).get("num_hidden_layers")
    kinds = {
        field.name: list(value)
        for field in dataclasses.fields(default)
        if isinstance(value := vars(default).get(field.name), (list, tuple))
        and len(value) == layers
        and all(isinstance(each, str) or each in (0, 1) for each in value)
    }
    if not kinds or layers <= LAYERS:
        return {}
    rows = list(zip(*kinds.values(), strict=True))
    chosen = sorted({rows.index(row) for row in rows})
    if len(chosen) < LAYERS:
        chosen = list(range(LAYERS))
    return {"num_hidden_layers": len(chosen)} | {name: [kinds[name][i] for i in chosen] for name in kinds}


def _split_rotary_dimensions(config: PretrainedConfig) -> None:
    """Multimodal rotary embeddings split their dimensions by time, height and width; the parts must add up."""
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            _split_rotary_dimensions(value)
    if config.model_type in MULTIMODAL_ROTARY:
        rope = config.rope_parameters
        half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
