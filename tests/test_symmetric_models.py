"""Contract: with `symmetric=True` and no noise to speak of, a step is that of the batch alone, whatever the model is given."""

import pytest
import torch
import transformers
from torch import nn

from helpers.models import BART, NO_DROPOUT, SMALL, T5, batch, build
from neft_kernels import replace_embeddings

BERT = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
IDS = batch()["input_ids"]
MASK = batch()["attention_mask"]
CHOICES = {"input_ids": torch.stack((IDS, IDS.flip(1)), 1), "attention_mask": torch.stack((MASK, MASK.flip(1)), 1)}


def llava():
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**SMALL),
        image_token_index=1,
        vision_feature_layer=-1,
    )


def llava_inputs():
    """Three pictures, of four tokens each, for two rows."""
    torch.manual_seed(3)
    ids = torch.randint(3, 50, (2, 12))
    ids[0, 1:9], ids[1, 2:6] = 1, 1
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(3, 3, 8, 8)}


# class, config, what it is given
MODELS = {
    "masked tokens": ("BertForMaskedLM", BERT, {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}),
    "tokens": ("BertForTokenClassification", BERT, {"input_ids": IDS, "labels": IDS % 2}),
    "sequences": ("BertForSequenceClassification", BERT, {"input_ids": IDS, "labels": torch.tensor([0, 1])}),
    "questions": (
        "BertForQuestionAnswering",
        BERT,
        {"input_ids": IDS, "start_positions": torch.tensor([0, 2]), "end_positions": torch.tensor([1, 3])},
    ),
    "choices": ("BertForMultipleChoice", BERT, {**CHOICES, "labels": torch.tensor([0, 1])}),
    "recurrent": ("MambaForCausalLM", {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}, batch()),
    "experts": (
        "MixtralForCausalLM",
        {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2, "output_router_logits": True},
        batch(),
    ),
    "outputs of the encoder": (
        "T5ForConditionalGeneration",
        {**T5, "decoder_start_token_id": 0},
        {"encoder_outputs": transformers.modeling_outputs.BaseModelOutput(torch.ones(2, 5, 16)), "labels": IDS},
    ),
    "outputs of the encoder, as a tuple": (
        "BartForConditionalGeneration",
        BART,
        {"encoder_outputs": (torch.ones(2, 5, 16),), "labels": IDS},
    ),
    "pictures": ("LlavaForConditionalGeneration", llava(), llava_inputs()),
}


def step(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return output, {name: gradient.clone() for name, gradient in gradients.items()}


def assert_same_step(model, inputs):
    """Plain, and symmetric without noise to speak of."""
    expected, plain = step(model, inputs)
    output, symmetric = step(replace_embeddings(model, 1e-30, symmetric=True), inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    assert output[1].shape == expected[1].shape  # the logits
    assert symmetric.keys() == plain.keys()
    for name, gradient in symmetric.items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_the_batch_alone(name):
    class_name, config, inputs = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config, **NO_DROPOUT) if isinstance(config, dict) else config).train()
    assert_same_step(model, inputs)


def test_several_rows_of_an_example_have_the_noise_and_its_negative():
    torch.manual_seed(0)
    model = transformers.BertForMultipleChoice(transformers.BertConfig(**BERT)).train()
    seen = []
    table = replace_embeddings(model, symmetric=True).get_input_embeddings()
    table.register_forward_hook(lambda module, args, output: seen.append(output - module.weight[args[0]]))
    model(**CHOICES, labels=torch.tensor([0, 1]))
    first, second = seen[0].detach().chunk(2)
    assert first.shape == (4, 7, 16)
    assert first.abs().max() > 0.1
    assert torch.allclose(first, -second, atol=1e-6)


class Sorting(nn.Module):
    """Looks its rows up from the shortest to the longest."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)

    def forward(self, input_ids, labels, lengths=None):
        order = torch.argsort(lengths, stable=True)
        return {"loss": self.table(input_ids[order]).square().mean()}


def test_rows_that_are_rearranged_later_are_an_error():
    model = replace_embeddings(Sorting(), symmetric=True).train()
    model(IDS, labels=IDS, lengths=torch.tensor([0, 0]))
    with pytest.raises(RuntimeError, match="looks up input_ids as they are"):
        model(IDS, labels=IDS, lengths=torch.tensor([2, 1]))


def test_an_output_that_is_a_dataclass_of_its_own():
    from dataclasses import dataclass

    @dataclass
    class Output:
        loss: torch.Tensor
        states: torch.Tensor

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 8)

        def forward(self, input_ids, labels):
            states = self.table(input_ids)
            return Output(states.square().mean(), states)

    output = replace_embeddings(Own(), symmetric=True).train()(IDS, labels=IDS)
    assert output.states.shape[0] == 2
    with pytest.raises(RuntimeError, match="use the loss that the model returns"):
        output.states.sum().backward()


def test_an_output_may_have_a_part_without_influence_in_the_loss():
    """As DDP gives outputs one that looks for parameters that are not used."""
    model = replace_embeddings(build("llama"), symmetric=True)
    output = model(**batch())
    (output.loss + 0 * output.logits.sum()).backward()
    assert model.get_input_embeddings().weight.grad.any()


class Summed(nn.Module):
    """Returns log-probabilities that the caller sums up, as models do for TRL's SFTTrainer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8)

    def forward(self, input_ids, labels):
        self.of_both = self.table(input_ids).sum(-1)
        return {"log_probs": self.of_both}


def test_log_probabilities_are_the_mean_over_both_halves():
    model = replace_embeddings(Summed(), symmetric=True).train()
    log_probs = model(IDS, labels=IDS)["log_probs"]
    first, second = model.of_both.chunk(2)
    assert not torch.equal(first, second)
    assert torch.equal(log_probs, (first + second) / 2)
