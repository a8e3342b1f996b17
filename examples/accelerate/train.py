"""A training loop of one's own, with accelerate: ``replace_embeddings`` before ``prepare``.

    accelerate launch -m examples.accelerate.train examples/accelerate/config.yaml

or with ``python -m`` in one process.
"""

import sys
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, HfArgumentParser

from examples import tiny
from neft_kernels import describe, replace_embeddings


@dataclass
class Options:
    alpha: float = 5.0
    model: str | None = None  # a folder or a name on the Hub; None: a tiny one
    steps: int = 20
    batch_size: int = 8
    learning_rate: float = 2e-3
    cpu: bool = False
    seed: int = 0


def main(config: str) -> list[float]:
    """Returns the losses."""
    (options,) = HfArgumentParser((Options,)).parse_yaml_file(config)
    set_seed(options.seed)
    accelerator = Accelerator(cpu=options.cpu)
    name = options.model or tiny.model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    replace_embeddings(model, alpha=options.alpha)

    texts = [f"{question}\n{answer}{tokenizer.eos_token}" for question, answer in tiny.pairs()]
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=128)["input_ids"]]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    loader = DataLoader(rows, options.batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)

    losses: list[float] = []
    while len(losses) < options.steps:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) % 5 == 0:
                accelerator.print(f"step {len(losses)}  loss {losses[-1]:.3f}")
            if len(losses) == options.steps:
                break
    accelerator.print(describe(accelerator.unwrap_model(model)))
    return losses


if __name__ == "__main__":
    main(sys.argv[1])
