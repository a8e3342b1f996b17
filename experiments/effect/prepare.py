"""What the runs share, prepared once and kept in a folder: tokenizer, examples and the model that they start from."""

import hashlib
import json
import shutil
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.effect.data import (
    Prepared,
    QuestionAnswer,
    collect_pairs,
    library_sources,
    made_once,
    split_pairs,
    to_examples,
    train_tokenizer,
)
from experiments.effect.measures import seen_share
from experiments.effect.plan import FromScratch, Preset, Pretrained
from experiments.effect.pretrained import prepare_pretrained
from experiments.effect.training import answer_loss, outcomes_of_references, pretrain


def prepare(preset: Preset, cache: Path, stdlib: Path | None = None, data: str | None = None) -> Prepared:
    """From `cache`, where it is there; else made, which for the small preset takes minutes.

    `stdlib` is the folder with the library's sources, the running Python's own by default; `data` is the data set of a
    pretrained model, the preset's own by default.
    """
    if isinstance(preset.start, Pretrained):
        return prepare_pretrained(preset, preset.start, cache, data)
    start = preset.start
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    train_pairs, held_out_pairs = split_pairs(collect_pairs(stdlib), start.held_out_fraction)
    sources = library_sources(stdlib)
    texts = [[pair.answer for pair in train_pairs], [pair.answer for pair in held_out_pairs], sources]
    key = hashlib.sha256(json.dumps([asdict(start), texts]).encode()).hexdigest()[:12]

    def make(folder: Path) -> None:
        _pretrain(preset, start, train_pairs, held_out_pairs, sources, folder)

    return Prepared.load(made_once(cache / key, make))  # presets that differ in nothing else share it


def _pretrain(
    preset: Preset,
    start: FromScratch,
    train_pairs: list[QuestionAnswer],
    held_out_pairs: list[QuestionAnswer],
    sources: list[str],
    folder: Path,
) -> None:
    begin = time.monotonic()
    questions_and_answers = [text for pair in train_pairs for text in (pair.question, pair.answer)]
    tokenizer = train_tokenizer([*questions_and_answers, *sources], start.vocab_size)
    tokenizer.save_pretrained(folder)
    train, held_out = (to_examples(pairs, tokenizer, start.pair_tokens) for pairs in (train_pairs, held_out_pairs))
    examples = {"train": [asdict(each) for each in train], "held_out": [asdict(each) for each in held_out]}
    (folder / "examples.json").write_text(json.dumps(examples))

    source_ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(sources).input_ids]
    stream = torch.tensor([token for ids in source_ids for token in ids])
    blocks = stream[: len(stream) // start.block_tokens * start.block_tokens].view(-1, start.block_tokens)
    model, losses = pretrain(start, tokenizer, blocks, folder / "trainer")
    model.save_pretrained(folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)

    digest = hashlib.sha256()
    for name in ("model.safetensors", "examples.json"):
        digest.update((folder / name).read_bytes())
    record = {
        "preset": preset.name,
        "stage": "pretraining",
        "start": digest.hexdigest()[:12],
        "settings": asdict(start),
        "seconds": round(time.monotonic() - begin),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "source_tokens": len(stream),
        "source_loss": losses,
        "embedding_std": next(model.get_input_embeddings().parameters()).std().item(),
        "training_pairs_to_draw_from": len(train),
        "held_out_pairs": len(held_out),
        "held_out_loss": answer_loss(model, tokenizer, held_out[: preset.tuning.loss_pairs]),
        "held_out_8grams_in_source": seen_share([each.answer_ids[:-1] for each in held_out], source_ids, 8),
        "references": outcomes_of_references(held_out, train),
    }
    (folder / "pretraining.json").write_text(json.dumps(record))
