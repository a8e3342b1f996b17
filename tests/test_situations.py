"""Contract: in situations that people have reported, the noise is right, or describe says why not, or it is an error."""

import logging

import pytest
import torch
import transformers
from torch import nn

from helpers.models import llama
from helpers.situations import ALPHA, IDS, MASK, WIDTH, Looks, bound, bounds, noise_of, notes
from neft_kernels import NEFTuneEmbedding, describe, no_noise, noise_magnitude, replace_embeddings, restore_embeddings

# --- masks -----------------------------------------------------------------------------------------------------------


class NoTensor:
    """As flex attention's BlockMask."""


def test_a_mask_that_is_no_tensor_is_noted():
    model = replace_embeddings(Looks(), ALPHA).train()
    model(IDS, attention_mask=NoTensor())
    assert bounds(model) == pytest.approx((bound(6),) * 2)
    assert notes(model) == ["attention_mask of type NoTensor does not tell the lengths of ids of shape [2, 6]"]


def test_of_masks_by_kind_the_one_that_tells_is_used():
    wide = torch.ones(2, 1, 6, 6)
    model = replace_embeddings(Looks(), ALPHA).train()
    model(IDS, attention_mask={"full_attention": wide, "sliding_attention": wide})
    assert notes(model) == ["attention_mask of shape [2, 1, 6, 6] does not tell the lengths of ids of shape [2, 6]"]
    model(IDS, attention_mask={"full_attention": wide, "padding": MASK})
    assert bounds(model) == pytest.approx((bound(6), bound(3)))
    assert notes(model) == [""]
    model(IDS, attention_mask={})
    assert notes(model) == ["attention_mask of type dict does not tell the lengths of ids of shape [2, 6]"]


def test_a_mask_elsewhere_is_noted_with_both_devices():
    model = replace_embeddings(Looks(), ALPHA).train()
    model(IDS, attention_mask=MASK.to("meta"))
    (note,) = notes(model)
    assert "on meta, not on cpu" in note


def test_lengths_in_place_of_a_mask():
    """As XLM and FlauBERT take them."""
    model = replace_embeddings(Looks(), ALPHA).train()
    noise = noise_of(model, IDS, lengths=torch.tensor([6, 3]))
    assert bounds(model) == pytest.approx((bound(6), bound(3)))
    assert torch.equal(noise.any(-1), MASK.bool())
    config = transformers.XLMConfig(vocab_size=60, emb_dim=WIDTH, n_layers=1, n_heads=2, dropout=0, pad_index=0)
    xlm = replace_embeddings(transformers.XLMModel(config).train(), ALPHA)
    xlm(input_ids=IDS, lengths=torch.tensor([6, 3]))
    assert bounds(xlm) == pytest.approx((bound(6), bound(3)))


def test_a_batch_of_which_nothing_tells_the_lengths_is_noted():
    model = replace_embeddings(Looks(), ALPHA).train()
    model(IDS)
    assert notes(model) == ["no mask or positions were given, so each row of [2, 6] ids counts in full length"]
    model(IDS[:1])
    assert notes(model) == [""]
    replace_embeddings(model, ALPHA, scale_by="batch")
    model(IDS)
    assert notes(model) == [""]


# --- look-ups outside of a pass --------------------------------------------------------------------------------------


class Doubled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_look_up_outside_of_a_pass_is_noted_and_may_be_told_the_mask(is_fused):
    model = Looks()
    if not is_fused:
        model.embedding = Doubled(60, WIDTH)
    replace_embeddings(model, ALPHA).train()
    model(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=MASK)
    (note,) = notes(model)
    assert "called outside of the model's forward" in note
    assert "attention_mask=attention_mask" in note
    embeds = model.get_input_embeddings()(IDS, attention_mask=MASK)
    assert notes(model) == [""]
    assert bounds(model) == pytest.approx((bound(6), bound(3)))
    plain = model.embedding.weight[IDS] * (1 if is_fused else 2)
    assert torch.equal((embeds != plain).any(-1), MASK.bool())


# --- the Hugging Face hook's attribute -------------------------------------------------------------------------------


def test_the_attribute_of_the_hook_alone_means_nothing(caplog):
    """Unsloth's generated trainers set it."""
    model = Looks()
    model.embedding.neftune_noise_alpha = 5.0
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        replace_embeddings(model, ALPHA).train()
        assert noise_of(model, IDS).any()
    assert not caplog.records
    assert describe(model)[0].state == "on"


# --- tables of other classes -----------------------------------------------------------------------------------------


def test_a_table_that_is_quantised_when_it_is_noisy_already():
    torchao = pytest.importorskip("torchao.quantization")
    model = replace_embeddings(Looks().to(torch.bfloat16), ALPHA).train()
    assert describe(model)[0].strategy == "fused"
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Embedding)
    )
    noise = noise_of(model, IDS, attention_mask=MASK)
    assert torch.equal(noise.any(-1), MASK.bool())
    (report,) = describe(model)
    assert report.strategy == "add_noise"
    assert report.last_magnitude == pytest.approx((bound(6), bound(3)))


@pytest.mark.cpu_extension
def test_describe_names_the_backend_of_a_table_that_is_kept_elsewhere():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(llama(), torch.device("cpu"))
    replace_embeddings(model, ALPHA)
    assert next(model.get_input_embeddings().parameters()).device.type == "meta"
    assert describe(model)[0].backend == "cpu"
    model(input_ids=IDS, attention_mask=MASK)
    assert describe(model)[0].backend == "cpu"


# --- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_noisy_before", [True, False])
def test_a_model_replaced_inside_of_no_noise_has_none_until_it_ends(is_noisy_before):
    model = Looks().train()
    if is_noisy_before:
        replace_embeddings(model)
    with no_noise(model), no_noise(model):
        replace_embeddings(model)
        assert torch.equal(model(IDS), model.embedding.weight[IDS])
        assert describe(model)[0].state == "off: inside no_noise"
    assert not torch.equal(model(IDS), model.embedding.weight[IDS])


def test_dora_put_on_later_is_noticed(caplog):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["embed_tokens"], use_dora=True)
    model = peft.get_peft_model(replace_embeddings(llama(), ALPHA), config).train()
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        for _ in range(2):
            model(input_ids=IDS, attention_mask=MASK)
    assert caplog.text.count("DoRA") == 1
    assert "DoRA" in notes(model)[0]
    replace_embeddings(model, ALPHA)
    caplog.clear()
    model(input_ids=IDS, attention_mask=MASK)
    assert "DoRA" not in caplog.text
    assert notes(model) == [""]


def test_nested_ids_are_an_error_that_says_what_to_do():
    ids = torch.nested.nested_tensor([IDS[0], IDS[1, :3]], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"nested tensor.*cu_seq_lens"):
        NEFTuneEmbedding(60, WIDTH)(ids)
    module = NEFTuneEmbedding(60, WIDTH).eval()
    assert module(ids).is_nested


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_says_what_to_use_instead():
    module = NEFTuneEmbedding(60, WIDTH)
    with pytest.raises(RuntimeError, match="restore_embeddings"):
        torch.jit.script(module)
    model = restore_embeddings(replace_embeddings(nn.Sequential(module)))
    module.noise = None
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(IDS), module.weight[IDS])


def test_positions_of_several_kinds_begin_with_those_of_text():
    """As transformers' Qwen2-VL and its kin have it."""
    text = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    model = replace_embeddings(Looks(), ALPHA).train()
    model(IDS, position_ids=torch.stack((text, *torch.zeros(3, 2, 6, dtype=torch.int64))))
    assert bounds(model) == pytest.approx((bound(6), bound(3)))
    assert notes(model) == [""]
    model(IDS, position_ids=torch.zeros(3, 2, 6, dtype=torch.int64))
    assert notes(model) == ["position_ids of shape [3, 2, 6] does not tell the lengths of ids of shape [2, 6]"]
    assert noise_magnitude(IDS, WIDTH, ALPHA) == bound(6)


# --- neighbours ------------------------------------------------------------------------------------------------------


class DropsTheLast(Looks):
    """Looks up all tokens but the last, as wrappers for autoregressive training do."""

    def forward(self, input_ids, attention_mask=None):
        return self.embedding(input_ids[:, :-1])


def test_a_mask_of_the_ids_given_is_cut_as_the_ids_are():
    model = replace_embeddings(DropsTheLast(), ALPHA).train()
    ids, mask = torch.tensor([[3, 4, 5, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    noise = noise_of(model, ids, attention_mask=mask)
    assert torch.equal(noise.any(-1), mask[:, :-1].bool())
    assert bounds(model) == pytest.approx((bound(3),) * 2)


class MakesAWideMask(nn.Module):
    """Calls a model with a 4-D mask of its own, as some models do."""

    def __init__(self):
        super().__init__()
        self.inner = Looks()

    def get_input_embeddings(self):
        return self.inner.embedding

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids, attention_mask=torch.ones(2, 1, 6, 6))


def test_a_usable_mask_outside_counts_where_the_inner_one_cannot_be_used():
    model = replace_embeddings(MakesAWideMask(), ALPHA).train()
    model(IDS, attention_mask=MASK)
    assert bounds(model) == pytest.approx((bound(6), bound(3)))
