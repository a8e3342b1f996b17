"""What model types of transformers cannot do, with noise or without: they are not built, are refused, or skip a check."""

#: Model types that cannot be built or called here, and why.
NOT_BUILT = {
    **dict.fromkeys(
        ("fast_vlm", "gemma3n", "omdet-turbo", "pe_audio_video", "pe_video", "perception_lm"), "needs timm"
    ),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts on the keys and values of another model"),
    "higgs_audio_v2_tokenizer": "needs torchaudio",
    "inkling_mm_model": "needs scipy",
    "layoutlmv2": "needs detectron2",
    "tvp": "takes a batch of one video only",
    "voxtral_realtime_text": "its auto class does not exist",
}

#: Model types whose token embedding cannot be told: none of their parts names one, or it is no module.
REFUSED = (
    *("canine", "clvp", "dia", "fastspeech2_conformer", "fastspeech2_conformer_with_hifigan", "grounding-dino"),
    *("groupvit", "mm-grounding-dino", "nemotron3_5_asr", "nemotron_asr_streaming", "owlv2", "owlvit"),
    *("parakeet_rnnt", "parakeet_tdt", "perceiver", "sam3", "sam3_lite_text", "sam3_lite_text_text_model", "vits"),
)

#: Arguments of models that hear a stream of sound: what they keep of it from one piece to the next.
CACHES_OF_SOUND = ("encoder_cache", "padding_cache")

_TEXT_PART = "only its text part names its embedding"
_PARAMETRIZED = "parametrized convolutions cannot be pickled"
#: What these models cannot do without noise either, and why.
CANNOT: dict[str, dict[str, str]] = {
    "deepcopy": {"recurrent_gemma": "keeps the states of its last pass, which are no leaves"},
    "pickle": {
        **dict.fromkeys(("colpali", "pe_audio"), "transformers hooks a local function on it"),
        **dict.fromkeys(
            ("apertus1p5", "musicgen", "musicgen_melody", "speech-encoder-decoder", "speecht5"), _PARAMETRIZED
        ),
    },
    "resize": {
        **dict.fromkeys(("encoder-decoder", "musicgen", "musicgen_melody", "speech-encoder-decoder"), "not supported"),
        **dict.fromkeys(("ibert", "vision-encoder-decoder"), "not supported"),
        **dict.fromkeys(("csm", "kyutai_speech_to_text"), "several codebooks in one table"),
        "cpmant": "its table holds its prompts as well",
        "esm": "its output keeps its size",
        **dict.fromkeys(("aimv2", "align", "altclip", "chinese_clip", "clap", "clip", "clipseg"), _TEXT_PART),
        **dict.fromkeys(("flava", "metaclip_2", "pe_audio", "pp_formulanet", "vision-text-dual-encoder"), _TEXT_PART),
        "xclip": _TEXT_PART,
    },
    "reload": {"shieldgemma2": "from_pretrained() does not know the names that save_pretrained() gives its weights"},
    "checkpoint": {"pi0": "needs the cache that checkpointing turns off"},
}
