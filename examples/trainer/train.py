"""Fine-tunes with the Trainer of transformers: the noise is a callback.

python -m examples.trainer.train examples/trainer/config.yaml
"""

import sys
from dataclasses import dataclass

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from examples import tiny
from neft_kernels import NEFTuneCallback


@dataclass
class Options:
    alpha: float = 5.0
    model: str | None = None  # a folder or a name on the Hub; None: a tiny one


def main(config: str) -> Trainer:
    options, args = HfArgumentParser((Options, TrainingArguments)).parse_yaml_file(config)
    name = options.model or tiny.model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    texts = [f"{question}\n{answer}{tokenizer.eos_token}" for question, answer in tiny.pairs()]
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=128)["input_ids"]]
    trainer = Trainer(
        model,
        args,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[NEFTuneCallback(alpha=options.alpha)],
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1])
