"""The settings of the experiments on NEFTune's effect: presets, conditions, and the list of runs."""

from dataclasses import asdict, dataclass, replace
from typing import Any

#: How the documents of an update are laid out: a padded row each, or all in one row, with positions that start anew.
PADDED, PACKED = "padded", "packed"
#: Who adds the noise: neft_kernels, with alpha as in the paper or as a share of the embeddings' size, or the forward hook of
#: transformers, which scales by the length of the row; or neft_kernels with sign noise, without and with each pair's negative,
#: where alpha is that of the uniform noise that has the same root mean square.
OURS, RMS, HOOK = "neft_kernels", "neft_kernels, scale_by=rms", "transformers hook"
SIGN, SIGN_SYMMETRIC = "neft_kernels, noise=sign", "neft_kernels, noise=sign, symmetric"

#: The stages of records about what the runs start from: a Llama that was pretrained here, a model as it comes.
STARTS = ("pretraining", "untouched")


@dataclass(frozen=True)
class FromScratch:
    """A Llama that is pretrained on the library's source; its docstrings are what it is tuned on."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    block_tokens: int
    pretraining_steps: int
    pretraining_blocks: int  # in an update
    pretraining_learning_rate: float
    pair_tokens: int  # longer pairs are left out
    held_out_fraction: float
    bf16: bool


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model, and a set of instructions with their answers."""

    model: str  # on the hub
    data: str | None  # on the hub; None where the user names it
    pair_tokens: int
    held_out_fraction: float
    bf16: bool


@dataclass(frozen=True)
class Tuning:
    """The fine-tuning of a run, and what is measured after it."""

    training_pairs: int | None  # drawn by the seed; None: all
    epochs: int
    update_pairs: int
    learning_rate: float
    loss_pairs: int  # at most so many, of the held-out and of the training pairs
    answered_pairs: int  # at most so many held-out questions are answered
    answer_tokens: int  # at most


@dataclass(frozen=True)
class Condition:
    """A layout and who adds the noise; alpha 0 of a layout is in the condition of neft_kernels."""

    layout: str
    noise_by: str
    alphas: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One fine-tuning run."""

    layout: str
    noise_by: str
    alpha: float
    seed: int


@dataclass(frozen=True)
class Preset:
    """An experiment."""

    name: str
    start: FromScratch | Pretrained
    tuning: Tuning
    conditions: tuple[Condition, ...]
    seeds: tuple[int, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the outcomes of a run depend on, but for the run's own fields."""
        return {**asdict(self.start), **asdict(self.tuning)}


def runs(preset: Preset) -> list[Run]:
    """Seed by seed, so that an experiment that is broken off has whole seeds."""
    return [
        Run(condition.layout, condition.noise_by, alpha, seed)
        for seed in preset.seeds
        for condition in preset.conditions
        for alpha in condition.alphas
    ]


SMALL_LLAMA = FromScratch(
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
    bf16=False,
)

SMALL = Preset(
    name="small",
    start=SMALL_LLAMA,
    tuning=Tuning(
        training_pairs=1000,
        epochs=3,
        update_pairs=8,
        learning_rate=5e-4,
        loss_pairs=384,
        answered_pairs=128,
        answer_tokens=128,
    ),
    conditions=(
        Condition(PADDED, OURS, (0, 5, 10, 15)),
        Condition(PACKED, OURS, (0, 5, 10, 15)),
        Condition(PACKED, HOOK, (5, 10, 15)),
    ),
    seeds=(0, 1, 2, 3, 4),
)

#: The same as "small" in everything that its runs share, alpha 0 among them. Added after the outcomes of "small" were known.
WEAKER = replace(SMALL, name="weaker", conditions=(Condition(PADDED, OURS, (0, 0.5, 1, 2)),))

GPU = replace(
    SMALL,
    name="gpu",
    start=replace(
        SMALL_LLAMA,
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
        bf16=True,
    ),
    tuning=replace(
        SMALL.tuning,
        training_pairs=1600,
        update_pairs=16,
        learning_rate=2e-4,
        loss_pairs=512,
        answered_pairs=256,
        answer_tokens=192,
    ),
    seeds=tuple(range(10)),
)

#: A pretrained model on real instructions, small enough for two cores.
SMOLLM2 = Preset(
    name="smollm2",
    start=Pretrained(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        data=None,
        pair_tokens=160,
        held_out_fraction=0.2,
        bf16=False,
    ),
    tuning=Tuning(
        training_pairs=64,
        epochs=2,
        update_pairs=8,
        learning_rate=5e-5,
        loss_pairs=96,
        answered_pairs=24,
        answer_tokens=64,
    ),
    conditions=(Condition(PACKED, OURS, (0, 5, 15)), Condition(PACKED, RMS, (0.1,))),
    seeds=(0, 1, 2),
)

#: The same in everything that its runs share, those without and with uniform noise among them.
SMOLLM2_SIGN = replace(
    SMOLLM2,
    name="smollm2-sign",
    conditions=(
        Condition(PACKED, OURS, (0, 5, 15)),
        Condition(PACKED, SIGN, (5, 15)),
        Condition(PACKED, SIGN_SYMMETRIC, (5, 15)),
    ),
)

#: All of Alpaca, with the epochs, the batch and the learning rate of the paper.
SMOLLM2_GPU = replace(
    SMOLLM2,
    name="smollm2-gpu",
    start=Pretrained(
        model="HuggingFaceTB/SmolLM2-1.7B", data="tatsu-lab/alpaca", pair_tokens=512, held_out_fraction=0.02, bf16=True
    ),
    tuning=Tuning(
        training_pairs=None,
        epochs=3,
        update_pairs=128,
        learning_rate=5e-5,
        loss_pairs=512,
        answered_pairs=256,
        answer_tokens=256,
    ),
)

#: For the tests: the whole chain in seconds; its outcomes mean nothing.
TINY = replace(
    SMALL,
    name="tiny",
    start=replace(
        SMALL_LLAMA,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        vocab_size=320,
        block_tokens=64,
        pretraining_steps=4,
        pretraining_blocks=4,
        pair_tokens=256,
        held_out_fraction=0.3,
    ),
    tuning=replace(
        SMALL.tuning, training_pairs=12, epochs=1, update_pairs=4, loss_pairs=4, answered_pairs=4, answer_tokens=12
    ),
    conditions=(
        Condition(PADDED, OURS, (0, 5)),
        Condition(PACKED, OURS, (0, 5)),
        Condition(PACKED, HOOK, (5,)),
    ),
    seeds=(0, 1),
)

PRESETS = {preset.name: preset for preset in (SMALL, WEAKER, GPU, SMOLLM2, SMOLLM2_SIGN, SMOLLM2_GPU, TINY)}
