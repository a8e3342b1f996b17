"""One training run, in a process of its own so that its peak memory is its own: `python run.py SETTINGS RESULT`.

Trains with SFTTrainer, measures the training and the held-out loss on the way (in eval mode, and so without noise),
times the training forward of the token embedding, and answers held-out questions.
"""

import resource
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from callbacks import ProgressBar, WatchEmbedding
from inputs import Examples, prompt_text, question_and_answer
from neft_kernels import replace_embeddings
from records import Answer, CurvePoint, Noise, RunResult, RunSettings

LORA: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "r": 16, "lora_alpha": 32}
ANSWERED_QUESTIONS = 2
MAX_ANSWER_TOKENS = 64

# SFTConfig turns it on by default; transformers has renamed it.
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(SFTConfig, "activation_checkpointing") else "gradient_checkpointing"
)


def run(settings: RunSettings) -> RunResult:
    set_seed(settings.seed)
    examples = Examples.load(Path(settings.examples))
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    if torch.cuda.is_available():
        model.to("cuda")
    if settings.lora:
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16, lora_alpha=32)
        )
    is_plain = settings.noise is Noise.OFF
    untrained_answers = answer_questions(model, tokenizer, examples, settings.max_length) if is_plain else []
    if settings.noise is Noise.NEFT_KERNELS:
        replace_embeddings(model, alpha=settings.alpha)

    trainer = make_trainer(settings, model, tokenizer, examples)
    watch = WatchEmbedding()
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(watch)
    trainer.add_callback(ProgressBar(settings.noise.value))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()

    peak_memory_bytes, peak_memory_kind = peak_memory()
    return RunResult(
        noise=settings.noise,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads",
        curve=loss_curve(trainer.state.log_history),
        embedding_ms=watch.embedding_ms,
        look_up_ms=watch.look_up_ms,
        peak_memory_bytes=peak_memory_bytes,
        peak_memory_kind=peak_memory_kind,
        answers=answer_questions(model, tokenizer, examples, settings.max_length),
        untrained_answers=untrained_answers,
        description=watch.description,
    )


def make_trainer(
    settings: RunSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
) -> SFTTrainer:
    on_gpu = torch.cuda.is_available()
    checkpointing: dict[str, Any] = {CHECKPOINTING: False}
    config = SFTConfig(
        output_dir=settings.output,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        max_length=settings.max_length,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 20,
        adam_beta2=0.95,  # a short run has no time for the default's long average
        seed=settings.seed,
        data_seed=settings.seed,  # the same batches in the same order in every run, whoever else draws random numbers
        neftune_noise_alpha=settings.alpha if settings.noise is Noise.TRAINER else None,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        **checkpointing,
        eval_on_start=True,
        prediction_loss_only=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )
    return SFTTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(examples.train),
        eval_dataset={
            "train": datasets.Dataset.from_list(examples.train[: len(examples.held_out)]),
            "held_out": datasets.Dataset.from_list(examples.held_out),
        },
    )


def loss_curve(log_history: list[dict[str, float]]) -> list[CurvePoint]:
    """Both losses at each evaluation; Trainer logs the two data sets one after the other."""
    train = [entry for entry in log_history if "eval_train_loss" in entry]
    held_out = [entry for entry in log_history if "eval_held_out_loss" in entry]
    return [
        CurvePoint(int(seen["step"]), seen["eval_train_loss"], unseen["eval_held_out_loss"])
        for seen, unseen in zip(train, held_out, strict=True)
    ]


def peak_memory() -> tuple[int, str]:
    """(bytes, what they are) of this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "GPU memory allocated by PyTorch"
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, which a child process inherits from its parent on Linux
        peak_line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak_line.split()[1]) * 1024, "resident memory of the whole process"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "resident memory of the whole process"


def answer_questions(model: Any, tokenizer: Any, examples: Examples, max_length: int) -> list[Answer]:
    """The model's greedy answers to the first held-out questions, without noise; both have at most `max_length` tokens."""
    model.eval()
    answers = []
    for example in examples.held_out[:ANSWERED_QUESTIONS]:
        prompt, expected = question_and_answer(example)
        inputs = tokenizer(
            prompt_text(prompt, tokenizer),
            add_special_tokens=isinstance(prompt, str),  # a chat template names them itself
            return_tensors="pt",
            truncation=True,
            max_length=max_length - 1,
        ).to(model.device)
        length = inputs["input_ids"].shape[1]
        answer_tokens = min(MAX_ANSWER_TOKENS, max_length - length)
        output_ids = model.generate(**inputs, max_new_tokens=answer_tokens, do_sample=False)
        text = tokenizer.decode(output_ids[0, length:], skip_special_tokens=True)
        question = prompt if isinstance(prompt, str) else prompt[0]["content"]
        answers.append(Answer(question.strip(), expected.strip(), text.strip()))
    return answers


if __name__ == "__main__":
    settings_path, result_path = map(Path, sys.argv[1:])
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    run(RunSettings.load(settings_path)).save(result_path)
