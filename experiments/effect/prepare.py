"""What the runs share, prepared once and kept in a folder: tokenizer, examples, the model that they start from, a record.

The model is a Llama that is pretrained here, or a pretrained one, which stays where it is.
"""

import hashlib
import json
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.effect.data import (
    Example,
    InputError,
    Prepared,
    QuestionAnswer,
    collect_pairs,
    instruction_pairs,
    library_sources,
    local_or_hub,
    made_once,
    split_pairs,
    to_examples,
    train_tokenizer,
)
from experiments.effect.measures import seen_share
from experiments.effect.plan import FromScratch, Preset, Pretrained
from experiments.effect.training import answer_loss, measure, outcomes_of_references, pretrain

Pairs = list[QuestionAnswer]


def prepare(preset: Preset, cache: Path, stdlib: Path | None = None, data: str | None = None) -> Prepared:
    """From `cache`, where it is there; else made, which for the small preset takes minutes.

    `stdlib` is the folder with the library's sources, the running Python's own by default; `data` is the name or path of a
    pretrained model's data set, the preset's own by default.
    """
    start = preset.start
    if isinstance(start, Pretrained):
        return _take(preset, start, cache, data or start.data)
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    sides = split_pairs(collect_pairs(stdlib), start.held_out_fraction)
    sources = library_sources(stdlib)
    texts = [*([pair.answer for pair in side] for side in sides), sources]
    # Presets that differ in nothing else share the folder.
    return _made(cache, [asdict(start), texts], lambda folder: _pretrain(preset, start, sides, sources, folder))


def _take(preset: Preset, start: Pretrained, cache: Path, data: str | None) -> Prepared:
    if data is None:
        raise InputError(f"--data: preset {preset.name!r} needs a file or the name of a data set")
    pairs, model = instruction_pairs(data), local_or_hub(start.model)
    texts = [[pair.question, pair.answer] for pair in pairs]
    return _made(
        cache, [preset.settings, model, texts], lambda folder: _measure(preset, start, pairs, model, data, folder)
    )


def _made(cache: Path, settings: list[Any], make: Callable[[Path], None]) -> Prepared:
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    return Prepared.load(made_once(cache / key, make))


def _pretrain(preset: Preset, start: FromScratch, sides: tuple[Pairs, Pairs], sources: list[str], folder: Path) -> None:
    """Pretrains a model on `sources`."""
    begin = time.monotonic()
    questions_and_answers = [text for pair in sides[0] for text in (pair.question, pair.answer)]
    tokenizer = train_tokenizer([*questions_and_answers, *sources], start.vocab_size)
    tokenizer.save_pretrained(folder)
    train, held_out = (to_examples(side, tokenizer, start.pair_tokens) for side in sides)
    (folder / "examples.json").write_text(json.dumps(_as_json(train, held_out)))

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
        "stage": "pretraining",
        "start": digest.hexdigest()[:12],
        "source_tokens": len(stream),
        "source_loss": losses,
        "embedding_std": next(model.get_input_embeddings().parameters()).std().item(),
        "held_out_loss": answer_loss(model, tokenizer, held_out[: preset.tuning.loss_pairs]),
        "held_out_8grams_in_source": seen_share([each.answer_ids[:-1] for each in held_out], source_ids, 8),
    }
    _save_record(folder, preset, record, model, train, held_out, begin)


def _measure(preset: Preset, start: Pretrained, pairs: Pairs, model: str, data: str, folder: Path) -> None:
    """Measures a model before it is tuned. `folder` gets its name or path."""
    begin = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    sides = split_pairs(pairs, start.held_out_fraction)
    train, held_out = (to_examples(side, tokenizer, start.pair_tokens) for side in sides)
    if len(train) < (preset.tuning.training_pairs or 1) or not held_out:
        raise InputError(
            f"--data {data}: {len(train)} pairs to train on and {len(held_out)} to hold out have at most "
            f"{start.pair_tokens} tokens; preset {preset.name!r} needs {preset.tuning.training_pairs} and 1"
        )
    examples = _as_json(train, held_out)
    (folder / "examples.json").write_text(json.dumps({"model": model, **examples}))

    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    digest = hashlib.sha256(json.dumps(examples).encode())
    for name, weights in network.state_dict().items():
        digest.update(name.encode())
        digest.update(weights.contiguous().numpy().data)
    if torch.cuda.is_available():
        network.to("cuda")
    outcomes, _ = measure(network, tokenizer, preset.tuning, train, held_out)
    record = {
        "stage": "untouched",
        "start": digest.hexdigest()[:12],
        "embedding_rms": network.get_input_embeddings().weight.square().mean().sqrt().item(),
        "pairs": len(pairs),
        "outcomes": outcomes,
    }
    _save_record(folder, preset, record, network, train, held_out, begin)


def _as_json(train: list[Example], held_out: list[Example]) -> dict[str, list[dict[str, Any]]]:
    return {"train": [asdict(each) for each in train], "held_out": [asdict(each) for each in held_out]}


def _save_record(
    folder: Path,
    preset: Preset,
    record: dict[str, Any],
    model: torch.nn.Module,
    train: list[Example],
    held_out: list[Example],
    begin: float,
) -> None:
    """Adds what the records of both kinds of start have."""
    common = {
        "preset": preset.name,
        "settings": asdict(preset.start),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_pairs_to_draw_from": len(train),
        "held_out_pairs": len(held_out),
        "references": outcomes_of_references(held_out, train),
        "seconds": round(time.monotonic() - begin),
    }
    (folder / "pretraining.json").write_text(json.dumps(common | record))
