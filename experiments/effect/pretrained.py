"""A pretrained model and instructions to tune it on, with the outcomes of the model before it is tuned."""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.effect.data import (
    InputError,
    Prepared,
    instruction_pairs,
    local_or_hub,
    made_once,
    split_pairs,
    to_examples,
)
from experiments.effect.plan import Preset, Pretrained
from experiments.effect.training import measure, outcomes_of_references


def prepare_pretrained(preset: Preset, start: Pretrained, cache: Path, data: str | None) -> Prepared:
    """From `cache`, where it is there; else made. `data` is a data set's name or path, the preset's own by default.

    The model stays where it is; the folder in `cache` has its name or path, the tokenizer, and the data as tokens.
    """
    data = data or start.data
    if data is None:
        raise InputError(f"--data: preset {preset.name!r} needs a file or the name of a data set")
    pairs = instruction_pairs(data)
    model = local_or_hub(start.model)
    texts = [[pair.question, pair.answer] for pair in pairs]
    key = hashlib.sha256(json.dumps([preset.settings, model, texts]).encode()).hexdigest()[:12]

    def make(folder: Path) -> None:
        begin = time.monotonic()
        train_pairs, held_out_pairs = split_pairs(pairs, start.held_out_fraction)
        tokenizer = AutoTokenizer.from_pretrained(model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        train, held_out = (to_examples(side, tokenizer, start.pair_tokens) for side in (train_pairs, held_out_pairs))
        if len(train) < (preset.tuning.training_pairs or 1) or not held_out:
            raise InputError(
                f"--data {data}: {len(train)} pairs to train on and {len(held_out)} to hold out have at most "
                f"{start.pair_tokens} tokens; preset {preset.name!r} needs {preset.tuning.training_pairs} and 1"
            )
        sides = {"train": [asdict(each) for each in train], "held_out": [asdict(each) for each in held_out]}
        (folder / "examples.json").write_text(json.dumps({"model": model, **sides}))

        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        digest = hashlib.sha256(json.dumps(sides).encode())
        for name, weights in network.state_dict().items():
            digest.update(name.encode())
            digest.update(weights.contiguous().numpy().data)
        if torch.cuda.is_available():
            network.to("cuda")
        outcomes, _ = measure(network, tokenizer, preset.tuning, train, held_out)
        record = {
            "preset": preset.name,
            "stage": "untouched",
            "start": digest.hexdigest()[:12],
            "settings": asdict(start),
            "seconds": round(time.monotonic() - begin),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "embedding_rms": network.get_input_embeddings().weight.square().mean().sqrt().item(),
            "pairs": len(pairs),
            "training_pairs_to_draw_from": len(train),
            "held_out_pairs": len(held_out),
            "outcomes": outcomes,
            "references": outcomes_of_references(held_out, train),
        }
        (folder / "pretraining.json").write_text(json.dumps(record))

    return Prepared.load(made_once(cache / key, make))
