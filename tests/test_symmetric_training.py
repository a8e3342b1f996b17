"""Contract: `symmetric=True` in the Trainer, in TRL and with PEFT, right or refused."""

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from helpers.models import batch, build
from helpers.sft import SFT, texts, tokenizer
from neft_kernels import NEFTuneCallback, describe, patch_transformers, replace_embeddings


class LookedUp(transformers.TrainerCallback):
    """Keeps the ids that the embedding is given while it trains, and between."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen = []
        embedding = kwargs["model"].get_input_embeddings()
        embedding.register_forward_pre_hook(lambda module, given: self.seen.append(given[0]))


def trainer(tmp_path, callbacks, **arguments):
    examples = [{name: value[0] for name, value in batch().items()} for _ in range(8)]
    arguments = {"per_device_train_batch_size": 2, "max_steps": 2, "report_to": "none", "use_cpu": True, **arguments}
    return transformers.Trainer(
        build("llama"),
        transformers.TrainingArguments(tmp_path, disable_tqdm=True, logging_steps=1, **arguments),
        train_dataset=examples,
        eval_dataset=examples,
        callbacks=callbacks,
    )


def test_the_callback_and_the_patch_double_the_batches_of_the_trainer(tmp_path):
    looked_up = LookedUp()
    trainer(tmp_path, [NEFTuneCallback(symmetric=True), looked_up]).train()
    assert [ids.shape for ids in looked_up.seen] == [(4, 7), (4, 7)]
    with patch_transformers(symmetric=True):
        trainer(tmp_path, [looked_up], neftune_noise_alpha=5.0, eval_strategy="steps", eval_steps=1).train()
    assert [ids.shape for ids in looked_up.seen[:2]] == [(4, 7), (8, 7)]  # the second batch is one of evaluation


def test_accumulated_steps_are_those_of_one_large_batch(tmp_path):
    def weights(**arguments):
        model_trainer = trainer(
            tmp_path, [NEFTuneCallback(lambda step: 1e-30, symmetric=True)], max_steps=1, **arguments
        )
        model_trainer.train()
        return torch.nn.utils.parameters_to_vector(model_trainer.model.parameters())

    accumulated = weights(gradient_accumulation_steps=4)
    torch.testing.assert_close(accumulated, weights(per_device_train_batch_size=8), atol=1e-6, rtol=1e-4)


def test_label_smoothing_of_the_trainer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="pass labels to it"):
        trainer(tmp_path, [NEFTuneCallback(symmetric=True)], label_smoothing_factor=0.1).train()


ARGUMENTS: dict = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no", "bf16": False}


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", SFT)
def test_sft_trainer(tmp_path, case, peft):
    """The metrics of TRL compare the logits with the labels of the batch that it gave."""
    looked_up = LookedUp()
    runner = trl.SFTTrainer(
        build("llama"),
        trl.SFTConfig(str(tmp_path), per_device_train_batch_size=3, logging_steps=1, **ARGUMENTS, **SFT[case]),
        train_dataset=texts(),
        processing_class=tokenizer(),
        callbacks=[NEFTuneCallback(symmetric=True, noise="sign"), looked_up],
        peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if peft else None,
    )
    runner.train()
    assert len(looked_up.seen) == 2
    for ids in looked_up.seen:
        assert torch.equal(*ids.flatten().chunk(2))
    assert 0 <= runner.state.log_history[0]["mean_token_accuracy"] <= 1
    assert describe(runner.model) == ()


@pytest.mark.parametrize("case", SFT)
def test_without_noise_a_step_is_that_of_the_batch_alone(tmp_path, case):
    """The loss is the mean over both halves, so that doubling alone changes nothing."""

    def step(callbacks):
        runner = trl.SFTTrainer(
            build("llama"),
            trl.SFTConfig(
                str(tmp_path),
                per_device_train_batch_size=3,
                gradient_accumulation_steps=2,
                max_grad_norm=0.0,
                optim="sgd",
                learning_rate=1.0,
                **ARGUMENTS | {"max_steps": 1},
                **SFT[case],
            ),
            train_dataset=texts(),
            processing_class=tokenizer(),
            callbacks=callbacks,
        )
        runner.train()
        return torch.nn.utils.parameters_to_vector(runner.model.parameters())

    start = torch.nn.utils.parameters_to_vector(build("llama").parameters())
    plain, symmetric = step([]), step([NEFTuneCallback(lambda step: 1e-30, symmetric=True)])
    assert (plain - start).abs().max() > 1e-2
    torch.testing.assert_close(symmetric, plain, atol=1e-6, rtol=1e-4)


LORA = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")


def losses_of_their_own(tmp_path):
    """Trainers whose loss is no multiple of the sum of the log-probabilities."""
    shared = {"processing_class": tokenizer(), "callbacks": [NEFTuneCallback(symmetric=True)], "peft_config": LORA}
    pairs = [{"prompt": f"w{n} w{n + 1}", "chosen": f" w{n}", "rejected": f" w{n + 2}"} for n in range(8)]
    few = {"per_device_train_batch_size": 2, **ARGUMENTS}
    yield (
        "DPO",
        lambda: trl.DPOTrainer(
            build("llama"), args=trl.DPOConfig(str(tmp_path), **few), train_dataset=Dataset.from_list(pairs), **shared
        ),
    )
    lengths = {"num_generations": 2, "max_completion_length": 8, **few}
    yield (
        "GRPO",
        lambda: trl.GRPOTrainer(
            build("llama"),
            reward_funcs=lambda completions, **kwargs: [
                float(len(each) + 7 * (i % 2)) for i, each in enumerate(completions)
            ],
            args=trl.GRPOConfig(str(tmp_path), **lengths),
            train_dataset=Dataset.from_list([{"prompt": f"w{n} w{n + 1}"} for n in range(8)]),
            **shared,
        ),
    )
    yield (
        "DFT",
        lambda: trl.SFTTrainer(
            build("llama"), trl.SFTConfig(str(tmp_path), loss_type="dft", **few), train_dataset=texts(), **shared
        ),
    )


@pytest.mark.parametrize("method", ["DPO", "GRPO", "DFT"])
def test_a_loss_that_is_computed_outside_of_the_model_is_an_error(tmp_path, method):
    runner = dict(losses_of_their_own(tmp_path))[method]()
    with pytest.raises((ValueError, RuntimeError), match=r"pass labels to it|use the loss that the model returns"):
        runner.train()


def prompt_tuned(model):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(model, config).train()


def test_prompt_tuning_once_its_wrapper_is_noisy():
    inputs = batch()
    model = replace_embeddings(prompt_tuned(build("llama")), symmetric=True)
    assert model(**inputs).logits.shape[:2] == (2, 3 + 7)
    model = prompt_tuned(replace_embeddings(build("llama"), symmetric=True))
    with pytest.raises(RuntimeError, match=r"call replace_embeddings\(\) on that"):
        model(**inputs)


def test_lora_on_a_symmetric_model_and_a_symmetric_model_with_lora():
    inputs, losses = batch(), []
    for make in (
        lambda: replace_embeddings(get_peft_model(build("llama"), LORA), symmetric=True),
        lambda: get_peft_model(replace_embeddings(build("llama"), symmetric=True), LORA),
    ):
        model = make()
        torch.manual_seed(3)
        output = model(**inputs)
        assert output.logits.shape[0] == 2
        output.loss.backward()
        losses.append(output.loss)
    assert torch.equal(*losses)
