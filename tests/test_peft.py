"""Contract: PEFT trains, saves, loads and merges adapters on a noisy model as on a plain one, with noise exactly once."""

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from helpers.models import batch, build, llama
from neft_kernels import describe, no_noise, noise_magnitude, replace_embeddings, restore_embeddings

WIDTH, ALPHA = 16, 5.0
IDS = torch.randint(3, 50, (2, 64), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 40:] = 0
MAGNITUDE = noise_magnitude(IDS, WIDTH, ALPHA, attention_mask=MASK)

CONFIGS = {
    "LoRA beside the embedding": lambda: LoraConfig(target_modules=["q_proj"], r=2),
    "LoRA on the embedding": lambda: LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2),
    "LoRA, embedding saved": lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], r=2),
    "LoRA, trainable tokens": lambda: LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4, 5]}, r=2
    ),
    "trainable tokens": lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[3, 4, 5]),
}
#: These look tokens up by themselves, past the embedding's own forward, so that noise has to be put on what they return.
ONLY_AFTER = ("LoRA, trainable tokens", "trainable tokens")
CASES = [(name, when) for name in CONFIGS for when in ("before", "after") if when == "after" or name not in ONLY_AFTER]


def adapted(name, when):
    """A noisy model with an adapter. when: "before" or "after" the adapter it was made noisy, or None: never."""
    model = llama()
    if when == "before":
        replace_embeddings(model, ALPHA)
    torch.manual_seed(1)
    model = get_peft_model(model, CONFIGS[name]()).train()
    if when == "after":
        replace_embeddings(model, ALPHA)
    return model


def trained(model, steps=2):
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        optimizer.step()
    return model


def embedded(model, **batch):
    """What the model's embedding, with all that wraps it, returns in a forward pass."""
    outputs = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: outputs.append(output))
    model(**(batch or {"input_ids": IDS, "attention_mask": MASK}))
    handle.remove()
    return outputs[-1].detach()


def check_noise_once(model):
    noisy = embedded(model)
    with no_noise(model):
        noise = noisy - embedded(model)
    assert not noise[MAGNITUDE == 0].any()
    relative = noise[MAGNITUDE > 0] / MAGNITUDE[MAGNITUDE > 0][:, None]
    # Values below 8 were rounded to float32 a few times, each time by up to 2**-22; the magnitude is above 0.1.
    assert relative.abs().max() <= 1 + 1e-5
    # 1664 draws of a uniform on (-1, 1): the relative standard error of their deviation is sqrt(0.2 / 1664) = 1.1 %.
    # That of noise added twice would be sqrt(2) times as much.
    assert relative.std().item() * 3**0.5 == pytest.approx(1, abs=0.066)


@pytest.mark.parametrize(("name", "when"), CASES)
def test_noise_is_there_exactly_once(name, when):
    check_noise_once(trained(adapted(name, when)))


@pytest.mark.parametrize("name", ONLY_AFTER)
def test_what_looks_tokens_up_by_itself_is_noisy_once_it_is_replaced_again(name):
    model = replace_embeddings(adapted(name, "before"), ALPHA)
    check_noise_once(trained(model))


@pytest.mark.parametrize(("name", "when"), CASES)
def test_merged_weights_are_those_of_a_model_that_was_never_noisy(name, when):
    noisy, plain = trained(adapted(name, when)), adapted(name, None)
    state = get_peft_model_state_dict(noisy)
    assert any((value != get_peft_model_state_dict(plain)[key]).any() for key, value in state.items())
    set_peft_model_state_dict(plain, state)
    merged, expected = noisy.merge_and_unload(), plain.merge_and_unload()
    assert merged.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[key], value), key

    restore_embeddings(merged)
    assert not describe(merged)
    for (key, ours), (_, theirs) in zip(merged.named_modules(), expected.named_modules(), strict=True):
        assert type(ours) is type(theirs), key
        assert set(vars(ours)) == set(vars(theirs)), key
        assert len(ours._forward_hooks) == len(theirs._forward_hooks), key
        assert len(ours._forward_pre_hooks) == len(theirs._forward_pre_hooks), key
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    assert torch.equal(merged(**batch).loss, expected(**batch).loss)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_model_made_noisy_before_is_noisy_still(name):
    merged = trained(adapted(name, "before")).merge_and_unload()
    check_noise_once(merged)


@pytest.mark.parametrize(("name", "when"), CASES)
def test_an_adapter_is_saved_and_loaded_into_a_noisy_model(name, when, tmp_path):
    model, plain = trained(adapted(name, when)), adapted(name, None)
    state = get_peft_model_state_dict(model)
    assert state.keys() == get_peft_model_state_dict(plain).keys()
    model.save_pretrained(tmp_path)

    base = replace_embeddings(llama(), ALPHA) if when == "before" else llama()
    loaded = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    if when == "after":
        replace_embeddings(loaded, ALPHA)
    again = get_peft_model_state_dict(loaded)
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(again[key], value), key
    check_noise_once(loaded)

    if "trainable tokens" not in name:  # of which PEFT takes one adapter for the same tokens only
        loaded.load_adapter(tmp_path, "second", is_trainable=True)
        loaded.set_adapter("second")
        check_noise_once(loaded.train())
    with no_noise(loaded), no_noise(model):
        assert torch.equal(embedded(loaded), embedded(model))


T5_CONFIGS = {
    "LoRA on the embeddings": lambda: LoraConfig(target_modules=["q", "embed_tokens"], r=2),
    "LoRA, embeddings saved": lambda: LoraConfig(target_modules=["q"], modules_to_save=["embed_tokens"], r=2),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", T5_CONFIGS)
def test_both_sides_of_an_encoder_decoder_model_are_noisy_once(name, when):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50,
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).train()
    if when == "before":
        replace_embeddings(model, ALPHA)
    model = get_peft_model(model, T5_CONFIGS[name]()).train()
    if when == "after":
        replace_embeddings(model, ALPHA)
    batch = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS.flip(1)}
    for side, magnitude in (("encoder", MAGNITUDE), ("decoder", torch.full(IDS.shape, ALPHA / (64 * WIDTH) ** 0.5))):
        part = getattr(model, f"get_{side}")()
        outputs = []
        handle = part.get_input_embeddings().register_forward_hook(lambda module, args, out, to=outputs: to.append(out))
        model(**batch)
        with no_noise(model):
            model(**batch)
        handle.remove()
        noise = outputs[0] - outputs[1]
        assert not noise[magnitude == 0].any(), side
        relative = noise[magnitude > 0] / magnitude[magnitude > 0][:, None]
        assert relative.abs().max() <= 1 + 1e-4, side  # T5's embeddings are of size 1 to 4: rounded 16 times as much
        assert relative.std().item() * 3**0.5 == pytest.approx(1, abs=0.066), side


def test_peft_methods_that_look_tokens_up_by_themselves():
    configs = [
        TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2]),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ]
    for config in configs:
        model = replace_embeddings(get_peft_model(build("llama"), config).train(), alpha=5.0)
        inputs = batch()
        losses = {model(**inputs).loss.item() for _ in range(3)}
        assert len(losses) == 3, type(config)
        magnitudes = [report.last_magnitude for report in describe(model) if report.last_magnitude]
        assert magnitudes == [pytest.approx((5.0 / (7 * 16) ** 0.5, 5.0 / (4 * 16) ** 0.5))], type(config)
