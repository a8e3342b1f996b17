"""Preference tuning with TRL's DPOTrainer and LoRA. The passes of the reference model have no noise.

python -m examples.dpo.train examples/dpo/config.yaml
"""

import sys
from dataclasses import dataclass

from datasets import Dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from examples import tiny
from neft_kernels import NEFTuneCallback


@dataclass
class Options:
    alpha: float = 5.0
    rank: int = 8
    model: str | None = None  # a folder or a name on the Hub; None: a tiny one


def main(config: str) -> DPOTrainer:
    options, args = HfArgumentParser((Options, DPOConfig)).parse_yaml_file(config)
    pairs = tiny.pairs()
    wrong = [answer for _, answer in pairs[1:] + pairs[:1]]  # the answer to the next question
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"role": "assistant", "content": other}],
        }
        for (question, answer), other in zip(pairs, wrong, strict=True)
    ]
    trainer = DPOTrainer(
        options.model or tiny.model(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[NEFTuneCallback(alpha=options.alpha)],
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
