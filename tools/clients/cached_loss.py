"""Trains a bi-encoder with the cached loss of sentence-transformers, which runs each pass twice. First checks its gradients.

The gradients must be those of the same loss without a cache. ``neft-kernels run --under-no-grad`` starts this program.
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_model import ROWS
from transformers.trainer import activate_neftune

ALPHA, MINI_BATCH = 5.0, 3


def gradients(model: SentenceTransformer, cached: bool) -> torch.Tensor:
    model.zero_grad()
    torch.manual_seed(0)
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH)
    columns = [model.preprocess([row[side] for row in ROWS[:8]]) for side in (0, 1)]
    if cached:
        loss(columns, torch.zeros(8)).backward()
    else:
        embedded = [loss.embed_minibatch_iter(column, with_grad=True, copy_random_state=False) for column in columns]
        parts = [[embeddings for embeddings, _ in column] for column in embedded]
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

    Path(os.environ["CLIENT_RECORD"]).write_text("")  # only what the Trainer does counts
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
