"""What the runs share, prepared once and kept in a folder: tokenizer, examples and the pretrained model."""

import hashlib
import json
import shutil
import sysconfig
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.effect.data import (
    Prepared,
    QuestionAnswer,
    collect_pairs,
    library_sources,
    split_pairs,
    to_examples,
    train_tokenizer,
)
from experiments.effect.measures import repeated_share, seen_share
from experiments.effect.plan import Preset
from experiments.effect.training import answer_loss, pretrain

#: What does not change the pretrained model, nor the examples.
NOT_SHARED = frozenset(
    {
        "name",
        "training_pairs",
        "epochs",
        "update_pairs",
        "learning_rate",
        "loss_pairs",
        "answered_pairs",
        "answer_tokens",
        "alphas",
        "seeds",
    }
)


def prepare(preset: Preset, cache: Path, stdlib: Path | None = None) -> Prepared:
    """From `cache`, where it is there; else made, which for the small preset takes minutes.

    `stdlib` is the folder with the library's sources, the running Python's own by default. What is cut off midway leaves
    no folder behind that looks complete.
    """
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    train_pairs, held_out_pairs = split_pairs(collect_pairs(stdlib), preset.held_out_fraction)
    sources = library_sources(stdlib)
    shared = {key: value for key, value in asdict(preset).items() if key not in NOT_SHARED}
    texts = [[pair.answer for pair in train_pairs], [pair.answer for pair in held_out_pairs], sources]
    key = hashlib.sha256(json.dumps([shared, texts]).encode()).hexdigest()[:12]
    folder = cache / key  # presets that differ in nothing else share it
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}-unfinished-", dir=cache))
        try:
            _prepare(preset, train_pairs, held_out_pairs, sources, unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Prepared.load(folder)


def _prepare(
    preset: Preset,
    train_pairs: list[QuestionAnswer],
    held_out_pairs: list[QuestionAnswer],
    sources: list[str],
    folder: Path,
) -> None:
    begin = time.monotonic()
    questions_and_answers = [text for pair in train_pairs for text in (pair.question, pair.answer)]
    tokenizer = train_tokenizer([*questions_and_answers, *sources], preset.vocab_size)
    tokenizer.save_pretrained(folder)
    train, held_out = (to_examples(pairs, tokenizer, preset.pair_tokens) for pairs in (train_pairs, held_out_pairs))
    examples = {"train": [asdict(each) for each in train], "held_out": [asdict(each) for each in held_out]}
    (folder / "examples.json").write_text(json.dumps(examples))

    source_ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(sources).input_ids]
    stream = torch.tensor([token for ids in source_ids for token in ids])
    blocks = stream[: len(stream) // preset.block_tokens * preset.block_tokens].view(-1, preset.block_tokens)
    model, losses = pretrain(preset, tokenizer, blocks, folder / "trainer")
    model.save_pretrained(folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)

    digest = hashlib.sha256()
    for name in ("model.safetensors", "examples.json"):
        digest.update((folder / name).read_bytes())
    answers = [each.answer_ids[:-1] for each in held_out]
    record = {
        "preset": preset.name,
        "stage": "pretraining",
        "start": digest.hexdigest()[:12],
        "settings": {key: value for key, value in asdict(preset).items() if key not in NOT_SHARED},
        "seconds": round(time.monotonic() - begin),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "source_tokens": len(stream),
        "source_loss": losses,
        "embedding_std": next(model.get_input_embeddings().parameters()).std().item(),
        "training_pairs_to_draw_from": len(train),
        "held_out_pairs": len(held_out),
        "held_out_loss": answer_loss(model, tokenizer, held_out[: preset.loss_pairs]),
        "held_out_8grams_in_source": seen_share(answers, source_ids, 8),
        "references": {  # the outcomes of the reference answers themselves
            "answer_tokens": sum(map(len, answers)) / len(answers),
            "repeated_4grams": sum(repeated_share(answer, 4) for answer in answers) / len(answers),
            "leaked_8grams": seen_share(answers, [each.answer_ids for each in train], 8),
        },
    }
    (folder / "pretraining.json").write_text(json.dumps(record))
