"""Pretraining, one fine-tuning run with the Trainer, and what is measured of its model, always without noise."""

import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from experiments.effect.data import Example, Prepared
from experiments.effect.measures import repeated_share, rouge_l, seen_share
from experiments.effect.plan import HOOK, OURS, PACKED, RMS, SIGN, SIGN_SYMMETRIC, FromScratch, Preset, Run, Tuning
from experiments.effect.probe import NoiseProbe
from neft_kernels import describe, replace_embeddings

#: Of replace_embeddings(), by who adds the noise.
OPTIONS: dict[str, dict[str, Any]] = {
    OURS: {},
    RMS: {"scale_by": "rms"},
    SIGN: {"noise": "sign"},
    SIGN_SYMMETRIC: {"noise": "sign", "symmetric": True},
}
PRETRAINING_SEED = 0
HELD_OUT_BLOCKS = 32  # of the source, at most
EVALUATION_ROWS = 32
SAMPLE_ANSWERS = 3  # that a record shows


def pretrain(
    start: FromScratch, tokenizer: PreTrainedTokenizerBase, blocks: Tensor, folder: Path
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """A Llama trained on `blocks` ``[N, block_tokens]``, and its loss on those it has seen and on a few it has not."""
    set_seed(PRETRAINING_SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=start.hidden_size,
            intermediate_size=start.intermediate_size,
            num_hidden_layers=start.num_hidden_layers,
            num_attention_heads=start.num_attention_heads,
            max_position_embeddings=2 * max(start.block_tokens, start.pair_tokens),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    count = min(HELD_OUT_BLOCKS, len(blocks) // 10)
    held_out, seen = (
        [{"input_ids": block, "labels": block} for block in part] for part in (blocks[:count], blocks[count:])
    )
    trainer: Any = Trainer(
        model,
        _arguments(
            start.bf16,
            folder,
            max_steps=start.pretraining_steps,
            per_device_train_batch_size=start.pretraining_blocks,
            per_device_eval_batch_size=start.pretraining_blocks,
            learning_rate=start.pretraining_learning_rate,
            disable_tqdm=False,
            seed=PRETRAINING_SEED,
        ),
        data_collator=default_data_collator,
        train_dataset=seen,
    )
    trainer.train()
    losses = {
        "seen": trainer.evaluate(seen[:count])["eval_loss"],
        "held_out": trainer.evaluate(held_out)["eval_loss"],
    }
    return model, losses


def fine_tune(preset: Preset, run: Run, prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Trains on the pairs that the run's seed draws, in the order it draws; returns the run's part of its record."""
    begin = time.monotonic()
    tuning, is_own = preset.tuning, isinstance(preset.start, FromScratch)
    count = len(prepared.train) if tuning.training_pairs is None else tuning.training_pairs
    training = random.Random(run.seed).sample(prepared.train, count)
    tokenizer = AutoTokenizer.from_pretrained(prepared.folder)
    model = AutoModelForCausalLM.from_pretrained(prepared.model, dtype=torch.float32)
    if run.noise_by in OPTIONS:
        options = OPTIONS[run.noise_by]
        weaker = math.sqrt(3) if options.get("noise") == "sign" else 1.0  # at the same alpha sign noise is stronger
        replace_embeddings(model, alpha=run.alpha / weaker, **options)
    probe = NoiseProbe()
    trainer = Trainer(
        model,
        _arguments(
            preset.start.bf16,
            folder,
            num_train_epochs=tuning.epochs,
            per_device_train_batch_size=tuning.update_pairs,
            learning_rate=tuning.learning_rate,
            neftune_noise_alpha=float(run.alpha) if run.noise_by == HOOK else None,
            disable_tqdm=is_own,  # many short runs side by side
            seed=run.seed,
        ),
        data_collator=DataCollatorWithFlattening() if run.layout == PACKED else DataCollatorForSeq2Seq(tokenizer),
        train_dataset=[_labelled(example) for example in training],
        callbacks=[probe],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    description = str(describe(model))
    outcomes, answers = measure(model, tokenizer, tuning, training, prepared.held_out)
    return {
        "outcomes": outcomes,
        "first_update": probe.found,
        "updates": trainer.state.global_step,
        "describe": description,
        **({"answers": answers[:SAMPLE_ANSWERS]} if is_own else {}),  # other texts are not ours to pass on
        "seconds": round(time.monotonic() - begin, 1),
    }


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tuning: Tuning,
    training: Sequence[Example],
    held_out: Sequence[Example],
) -> tuple[dict[str, float], list[list[str]]]:
    """The outcomes, and the questions that were asked with the answers to them."""
    asked = held_out[: tuning.answered_pairs]
    answers = greedy_answers(model, tokenizer, asked, tuning.answer_tokens)
    outcomes = {
        "held_out_loss": answer_loss(model, tokenizer, held_out[: tuning.loss_pairs]),
        "train_loss": answer_loss(model, tokenizer, training[: tuning.loss_pairs]),
        **_outcomes_of_answers(answers, asked, training, tokenizer),
    }
    texts = [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
    return outcomes, [[example.prompt, text] for example, text in zip(asked, texts, strict=True)]


def _arguments(bf16: bool, folder: Path, **options: Any) -> TrainingArguments:
    """What pretraining and fine-tuning have in common."""
    return TrainingArguments(
        output_dir=str(folder),
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        adam_beta2=0.95,  # a short run has no time for the default's long average
        data_seed=options["seed"],  # the same batches in the same order, whoever else draws random numbers
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        prediction_loss_only=True,
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        **options,
    )


def _labelled(example: Example) -> dict[str, list[int]]:
    """Only the answer is learned."""
    ignored = [-100] * len(example.prompt_ids)
    return {"input_ids": example.prompt_ids + example.answer_ids, "labels": ignored + example.answer_ids}


@torch.no_grad()
def answer_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> float:
    """Mean negative log-likelihood, in nats, of an answer token, the end included; in evaluation mode, so without noise."""
    model.eval()
    collate = DataCollatorForSeq2Seq(tokenizer)
    total, tokens = 0.0, 0
    by_length = sorted(examples, key=lambda each: len(each.prompt_ids) + len(each.answer_ids))  # less padding
    for rows in _batches(by_length):
        batch = collate([_labelled(row) for row in rows]).to(model.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        of_answer = labels != -100
        total += F.cross_entropy(logits[of_answer].float(), labels[of_answer], reduction="sum").item()
        tokens += int(of_answer.sum())
    return total / tokens


def greedy_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], most_tokens: int
) -> list[list[int]]:
    """The tokens of the model's answer to each question, up to and with the end, or `most_tokens` of them."""
    model.eval()
    answers = []
    for batch in _batches(examples):
        questions = tokenizer.pad(
            {"input_ids": [each.prompt_ids for each in batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        output = model.generate(
            input_ids=questions.input_ids,
            attention_mask=questions.attention_mask,
            max_new_tokens=most_tokens,
            do_sample=False,
        )
        for row in output[:, questions.input_ids.shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            answers.append(row[:end])
    return answers


def _outcomes_of_answers(
    answers: Sequence[list[int]],
    examples: Sequence[Example],
    training: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:
    ended = [answer[-1:] == [tokenizer.eos_token_id] for answer in answers]
    said = [answer[:-1] if is_whole else answer for answer, is_whole in zip(answers, ended, strict=True)]
    texts: list[Any] = [tokenizer.decode(answer, skip_special_tokens=True) for answer in said]
    count = len(answers)
    return {
        "answer_tokens": sum(map(len, said)) / count,
        "cut_off": sum(not is_whole for is_whole in ended) / count,
        "repeated_4grams": sum(repeated_share(answer, 4) for answer in said) / count,
        "rouge_l": sum(rouge_l(text, each.answer) for text, each in zip(texts, examples, strict=True)) / count,
        "leaked_8grams": seen_share(said, [example.answer_ids for example in training], 8),
    }


def outcomes_of_references(held_out: Sequence[Example], training: Sequence[Example]) -> dict[str, float]:
    """The outcomes of the reference answers themselves."""
    answers = [each.answer_ids[:-1] for each in held_out]
    return {
        "answer_tokens": sum(map(len, answers)) / len(answers),
        "repeated_4grams": sum(repeated_share(answer, 4) for answer in answers) / len(answers),
        "leaked_8grams": seen_share(answers, [each.answer_ids for each in training], 8),
    }


def _batches(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for first in range(0, len(examples), EVALUATION_ROWS):
        yield examples[first : first + EVALUATION_ROWS]
