"""Trains a sentence embedding model with the cached loss of sentence-transformers.

That loss runs each pass twice under one state of the generator, first without gradients. ``under_no_grad=True`` gives both the
same noise.

    python -m examples.sentence_transformers.train examples/sentence_transformers/config.yaml
"""

import sys
from dataclasses import dataclass

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
from transformers import HfArgumentParser

from examples import tiny
from neft_kernels import NEFTuneCallback


@dataclass
class Options:
    alpha: float = 5.0
    mini_batch_size: int = 16
    model: str | None = None  # a folder or a name on the Hub; None: a tiny one


def main(config: str) -> SentenceTransformerTrainer:
    options, args = HfArgumentParser((Options, SentenceTransformerTrainingArguments)).parse_yaml_file(config)
    model = SentenceTransformer(options.model or tiny.model("bert"), device="cpu" if args.use_cpu else None)
    trainer = SentenceTransformerTrainer(
        model,
        args,
        train_dataset=Dataset.from_list([{"anchor": q, "positive": a} for q, a in tiny.pairs()]),
        loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=options.mini_batch_size),
        callbacks=[NEFTuneCallback(alpha=options.alpha, under_no_grad=True)],
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
