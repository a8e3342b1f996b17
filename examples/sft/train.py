"""Fine-tunes with TRL's SFTTrainer on packed rows. The length of each sequence in a row is its own, not that of the row.

python -m examples.sft.train examples/sft/config.yaml
"""

import sys
from dataclasses import dataclass

from datasets import Dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from examples import tiny
from neft_kernels import NEFTuneCallback


@dataclass
class Options:
    alpha: float = 5.0
    model: str | None = None  # a folder or a name on the Hub; None: a tiny one


def main(config: str) -> SFTTrainer:
    options, args = HfArgumentParser((Options, SFTConfig)).parse_yaml_file(config)
    rows = [
        {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}
        for question, answer in tiny.pairs()
    ]
    trainer = SFTTrainer(
        options.model or tiny.model(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        callbacks=[NEFTuneCallback(alpha=options.alpha)],
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
