"""Contract: with TRL's SFTTrainer each sequence is scaled by its own length, however the batch is laid out."""

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers

from helpers.models import D, llama
from helpers.trainer import Look
from neft_kernels import NEFTuneCallback, describe


def tokenizer():
    words = [f"w{number}" for number in range(46)]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


SFT = {
    "padded": {},
    "packed": {"packing": True, "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
    "completion only": {"completion_only_loss": True},
}


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", SFT)
def test_sft_trainer(tmp_path, case, peft):
    """TRL's collators: each sequence is scaled by its own length, however the batch is laid out."""
    texts = [(f"w{n} w{n + 1}", "".join(f" w{n + k}" for k in range(2 + n % 4))) for n in range(24)]
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in texts])
    config = trl.SFTConfig(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        bf16=False,
        **SFT[case],
    )
    network, look = llama(), Look()
    runner = trl.SFTTrainer(
        network,
        config,
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=[NEFTuneCallback(5.0), look],
        peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if peft else None,
    )
    runner.train()
    bounds = [bound for report in look.reports for bound in report[0].last_magnitude]
    # Prompt and completion of 2 + (2 to 5) words, and the end token: sequences of 5 to 8 tokens.
    possible = torch.tensor([5.0 / (length * D) ** 0.5 for length in (5, 6, 7, 8)])
    assert all((possible - bound).abs().min() < 1e-6 for bound in bounds), bounds
    assert max(bounds) > min(bounds)
    assert all(report[0].note == "" for report in look.reports)
    assert describe(runner.model) == ()
