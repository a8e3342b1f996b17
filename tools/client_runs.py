"""The frameworks that ``make test-clients`` trains with, and the commands that it runs."""

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAMS = REPOSITORY / "tools" / "clients"

#: Left out, because its wheels need CUDA, and yet imported: an empty module stands in.
EMPTY = ("torchaudio",)


@dataclass(frozen=True)
class Run:
    """One training. `command` is what users type. In it and in `files` {work} is the run's folder, {data} that of the data."""

    name: str
    command: str
    files: dict[str, str]
    variables: dict[str, str]
    launcher: str | None = "neft-kernels run"
    under_no_grad: bool = False


@dataclass(frozen=True)
class Client:
    """One framework, and what of its requirements is not installed."""

    name: str
    packages: tuple[str, ...]
    runs: tuple[Run, ...]
    without: tuple[str, ...] = ()


TRL_ARGUMENTS = """
--model_name_or_path {data}/model --output_dir {work}/out --neftune_noise_alpha 5 --max_steps 3 --eval_strategy steps
--eval_steps 3 --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --use_cpu --bf16 False --report_to none
--save_strategy no --dtype float32
"""
TRL_REWARD = "--reward_model_name_or_path {data}/model --num_generations 2 --max_completion_length 12"
TRL_RUNS = {
    "sft": "--dataset_name {data}/messages",
    "dpo": "--dataset_name {data}/pairs",
    "kto": "--dataset_name {data}/judged",
    "reward": "--dataset_name {data}/pairs",
    "grpo": "--dataset_name {data}/prompts " + TRL_REWARD,
    "rloo": "--dataset_name {data}/prompts " + TRL_REWARD,
}

LLAMAFACTORY = """
stage: sft
do_train: true
model_name_or_path: {data}/model
finetuning_type: full
dataset: tiny
dataset_dir: {data}/alpaca
template: default
cutoff_len: 256
val_size: 0.25
output_dir: {work}/out
max_steps: 3
eval_strategy: steps
eval_steps: 3
per_device_train_batch_size: 2
per_device_eval_batch_size: 2
neftune_noise_alpha: 5
use_cpu: true
report_to: none
save_strategy: "no"
"""

AXOLOTL = """
base_model: {data}/model
datasets:
  - path: {data}/alpaca/train.jsonl
    ds_type: json
    type: alpaca
val_set_size: 0.25
dataset_prepared_path: {work}/prepared
output_dir: {work}/out
sequence_len: 512
attn_implementation: sdpa
micro_batch_size: 2
gradient_accumulation_steps: 1
max_steps: 3
eval_steps: 3
save_strategy: "no"
learning_rate: 0.0001
optimizer: adamw_torch
neftune_noise_alpha: 5
bf16: false
fp16: false
tf32: false
use_tensorboard: false
"""
AXOLOTL_VARIABLES = {"ACCELERATE_USE_CPU": "true", "AXOLOTL_DO_NOT_TRACK": "1"}

SWIFT = """
--model {data}/model --model_type llama --template dummy --dataset {data}/messages/train.jsonl --split_dataset_ratio 0.25
--tuner_type full --torch_dtype float32 --attn_impl sdpa --output_dir {work}/out --max_steps 3 --eval_strategy steps
--eval_steps 3 --save_strategy no --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --neftune_noise_alpha 5
--use_cpu true --report_to none
"""

CLIENTS = (
    Client(
        "TRL",
        ("trl==1.16.0", "peft"),
        tuple(Run(name, f"trl {name} {TRL_ARGUMENTS} {arguments}", {}, {}) for name, arguments in TRL_RUNS.items()),
    ),
    Client(
        "sentence-transformers",
        ("sentence-transformers==6.2.0", "accelerate", "datasets"),
        (
            Run(
                "cached loss",
                f"python {PROGRAMS}/cached_loss.py {{data}}/model {{work}}/out",
                {},
                {},
                launcher="neft-kernels run --under-no-grad",
                under_no_grad=True,
            ),
        ),
    ),
    Client(
        "LLaMA-Factory",
        ("llamafactory==0.9.5",),
        (
            Run("sft", "llamafactory-cli train {work}/config.yaml", {"config.yaml": LLAMAFACTORY}, {}),
            Run(
                "sft, torchrun",
                "llamafactory-cli train {work}/config.yaml",
                {"config.yaml": LLAMAFACTORY + "ddp_backend: gloo\n"},
                {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"},
            ),
        ),
        without=("torchvision", "torchaudio"),
    ),
    Client(
        "axolotl",
        ("axolotl==0.19.0",),
        (
            Run("sft", "axolotl train {work}/config.yaml", {"config.yaml": AXOLOTL}, AXOLOTL_VARIABLES),
            Run(
                "sft, plugin",
                "axolotl train {work}/config.yaml",
                {"config.yaml": AXOLOTL + "plugins:\n  - neft_kernels.integrations.axolotl.NEFTunePlugin\n"},
                AXOLOTL_VARIABLES,
                launcher=None,
            ),
        ),
        without=("xformers",),
    ),
    Client(
        "ms-swift",
        ("ms-swift==4.6.0",),
        (
            Run("sft", f"swift sft {SWIFT}", {}, {}),
            Run(
                "sft, plugin",
                f"swift sft {SWIFT} --external_plugins {REPOSITORY}/neft_kernels/integrations/swift/neftune.py",
                {},
                {},
                launcher=None,
            ),
        ),
    ),
)

#: Frameworks that were not run: what to do there, and why they were not.
NOT_RUN = {
    "unsloth": (
        "`NEFTuneCallback`, with `neftune_noise_alpha` unset",
        "Not run: unsloth cannot be imported without a GPU. By its source (2026.10.9) its trainers put a hook of their own on "
        "the embedding if `neftune_noise_alpha` is set. The launcher does not reach that hook.",
    ),
    "NeMo Automodel": (
        "`replace_embeddings(model)` in the recipe, with `neftune` unset",
        "Not run: its recipes are for GPUs. By its source (0.7.0) they have a training loop and a NEFTune hook of their own "
        "instead of the Trainer's. The launcher does not reach that hook.",
    ),
}
