"""Trains a bi-encoder with the cached loss of sentence-transformers, which runs each pass twice. First checks its gradients.

The gradients must be those of the same loss without a cache. ``neft-kernels run --under-no-grad`` starts this program.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_model import ROWS
from transformers.trainer import activate_neftune

ALPHA, MINI_BATCH = 5.0, 3


def mini_batches(column: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(column["input_ids"]), MINI_BATCH):
        yield {
            name: value[start : start + MINI_BATCH] if isinstance(value, torch.Tensor) else value
            for name, value in column.items()
        }


def gradients(model: SentenceTransformer, cached: bool) -> torch.Tensor:
    model.zero_grad()
    torch.manual_seed(0)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH)
    columns = [model.preprocess([row[side] for row in ROWS[:8]]) for side in (0, 1)]
    if cached:
        loss(columns, torch.zeros(8)).backward()
    else:
        parts = [[model(rows)["sentence_embedding"] for rows in mini_batches(column)] for column in columns]
        loss.calculate_loss(parts).backward()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])


def main(model_folder: str, output: str) -> None:
    transformer = Transformer(model_folder)
    model = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
    model.train()
    plain = gradients(model, cached=False)
    handle = activate_neftune(model, ALPHA)
    expected = gradients(model, cached=False)
    difference = (gradients(model, cached=True) - expected).abs().max() / expected.abs().max()
    handle.remove()
    print(f"the noise changes the gradients by {(plain - expected).abs().max() / expected.abs().max():.1e}", flush=True)
    print(f"gradients: {difference:.1e}", flush=True)
    if not difference < 1e-5:  # float32, sums in another order
        sys.exit("the gradients of the cached loss are not those of the loss")

    rows = Dataset.from_dict({"question": [row[0] for row in ROWS], "answer": [row[1] for row in ROWS]})
    arguments = SentenceTransformerTrainingArguments(
        output,
        max_steps=3,
        per_device_train_batch_size=6,
        neftune_noise_alpha=ALPHA,
        use_cpu=True,
        report_to=[],
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
    )
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH)
    SentenceTransformerTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows.select(range(8)), loss=loss
    ).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
