"""The settings of the experiment on NEFTune's effect: presets, conditions, and the list of runs."""

from dataclasses import dataclass, replace

#: How the documents of an update are laid out: a padded row each, or all in one row, with positions that start anew.
PADDED, PACKED = "padded", "packed"
#: Who adds the noise: neft_kernels, or the forward hook of transformers, which scales by the length of the row.
OURS, HOOK = "neft_kernels", "transformers hook"


@dataclass(frozen=True)
class Preset:
    """Everything that the outcomes depend on, but for the layout, the noise and the seed of a run."""

    name: str
    # the model and its pretraining on the library's source
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    block_tokens: int
    pretraining_steps: int
    pretraining_blocks: int  # in an update
    pretraining_learning_rate: float
    # instruction tuning on its docstrings
    pair_tokens: int  # longer pairs are left out
    held_out_fraction: float
    training_pairs: int  # drawn by the seed
    epochs: int
    update_pairs: int
    learning_rate: float
    bf16: bool
    # measuring
    loss_pairs: int  # at most so many, of the held-out and of the training pairs
    answered_pairs: int  # at most so many held-out questions are answered
    answer_tokens: int  # at most
    alphas: tuple[float, ...]
    seeds: tuple[int, ...]


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="small",
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=4096,
            block_tokens=256,
            pretraining_steps=800,
            pretraining_blocks=8,
            pretraining_learning_rate=2e-3,
            pair_tokens=96,
            held_out_fraction=0.15,
            training_pairs=1000,
            epochs=3,
            update_pairs=8,
            learning_rate=5e-4,
            bf16=False,
            loss_pairs=384,
            answered_pairs=128,
            answer_tokens=128,
            alphas=(0, 5, 10, 15),
            seeds=(0, 1, 2, 3, 4),
        ),
        Preset(
            name="gpu",
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            vocab_size=8192,
            block_tokens=512,
            pretraining_steps=1000,
            pretraining_blocks=32,
            pretraining_learning_rate=1e-3,
            pair_tokens=192,
            held_out_fraction=0.15,
            training_pairs=1600,
            epochs=3,
            update_pairs=16,
            learning_rate=2e-4,
            bf16=True,
            loss_pairs=512,
            answered_pairs=256,
            answer_tokens=192,
            alphas=(0, 5, 10, 15),
            seeds=tuple(range(10)),
        ),
        Preset(  # for the tests: the whole chain in seconds; its outcomes mean nothing
            name="tiny",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=320,
            block_tokens=64,
            pretraining_steps=4,
            pretraining_blocks=4,
            pretraining_learning_rate=2e-3,
            pair_tokens=256,
            held_out_fraction=0.3,
            training_pairs=12,
            epochs=1,
            update_pairs=4,
            learning_rate=5e-4,
            bf16=False,
            loss_pairs=4,
            answered_pairs=4,
            answer_tokens=12,
            alphas=(0, 5),
            seeds=(0, 1),
        ),
    )
}


#: The same as "small" in everything that its runs share, alpha 0 among them. Added after the outcomes of "small" were known.
PRESETS["weaker"] = replace(PRESETS["small"], name="weaker", alphas=(0, 0.5, 1, 2))

ALL_ARMS = ((PADDED, OURS), (PACKED, OURS), (PACKED, HOOK))
ARMS_OF = {"weaker": ((PADDED, OURS),)}


@dataclass(frozen=True)
class Run:
    """One fine-tuning run."""

    layout: str
    noise_by: str
    alpha: float
    seed: int


def runs(preset: Preset) -> list[Run]:
    """Seed by seed, so that an experiment that is broken off has whole seeds; alpha 0 is the same with the hook as without."""
    return [
        Run(layout, noise_by, alpha, seed)
        for seed in preset.seeds
        for layout, noise_by in ARMS_OF.get(preset.name, ALL_ARMS)
        for alpha in preset.alphas
        if alpha or noise_by == OURS
    ]
