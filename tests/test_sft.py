"""Contract: with TRL's SFTTrainer each sequence is scaled by its own length, however the batch is laid out."""

import pytest
import torch
import trl
from peft import LoraConfig

from helpers.models import D, llama
from helpers.sft import SFT, texts, tokenizer
from helpers.trainer import Look
from neft_kernels import NEFTuneCallback, describe


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", SFT)
def test_sft_trainer(tmp_path, case, peft):
    """TRL's collators: each sequence is scaled by its own length, however the batch is laid out."""
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
        train_dataset=texts(),
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
