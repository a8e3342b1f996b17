"""Contract: noise is where a model looks its tokens up, also when that has become another module since."""

import copy

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from test_huggingface import batch, build, names

from neft_kernels import describe, no_noise, replace_embeddings, restore_embeddings, set_alpha
from neft_kernels.placing import FollowLookups, noisy_modules

TOKENS = TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2])


def into_first_layer(model):
    """What the decoder's first layer is given in one forward pass."""
    given = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    handle = layer.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    model(**batch())
    handle.remove()
    return given[0]


def hook_of(model):
    (owner,) = (
        owner
        for hook in model._forward_pre_hooks.values()
        if isinstance(owner := getattr(hook, "__self__", None), FollowLookups)
    )
    return owner


def test_what_has_a_forward_around_ours_works_on_when_restored():
    """As accelerate puts it there, which calls the forward that it found."""
    model = replace_embeddings(build("llama"))
    embedding = model.get_input_embeddings()
    forward = embedding.forward
    embedding.forward = lambda *args: forward(*args)
    plain = build("llama")
    restore_embeddings(model)
    assert names(model) == []
    assert torch.equal(into_first_layer(model), into_first_layer(plain))
    replace_embeddings(model, alpha=2.0)
    assert not torch.equal(into_first_layer(model), into_first_layer(plain))
    assert [report.alpha for report in describe(model)] == [2.0]


def test_no_table_outside_of_the_model_is_touched():
    model = replace_embeddings(build("llama"))
    elsewhere = torch.nn.Embedding(50, 16)
    model.get_input_embeddings = lambda: elsewhere
    into_first_layer(model)
    assert type(elsewhere) is torch.nn.Embedding
    assert names(model) == ["model.embed_tokens"]


@pytest.mark.parametrize(
    "config",
    [TOKENS, LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})],
    ids=["trainable tokens", "LoRA with trainable tokens"],
)
def test_the_first_pass_after_an_adapter_is_noisy_already(config):
    """As when a trainer puts the adapter on: nobody calls anything of ours between it and the first step."""
    model = get_peft_model(replace_embeddings(build("llama")), config).train()
    noisy = into_first_layer(model)
    with no_noise(model):
        assert not torch.equal(noisy, into_first_layer(model))
    assert len(names(model)) == 1


def test_settings_move_with_the_noise():
    model = replace_embeddings(build("llama"), alpha=3.0, scale_by="batch")
    adapter = get_peft_model(model, TOKENS).train()
    set_alpha(adapter, 2.0)
    (report,) = describe(adapter)
    assert (report.alpha, report.scale_by, report.strategy) == (2.0, "batch", "add_noise")
    into_first_layer(adapter)
    (report,) = describe(adapter)
    assert report.last_magnitude == pytest.approx((2.0 / (7 * 16) ** 0.5,) * 2)


def test_a_table_that_the_user_sets_is_noisy():
    model = replace_embeddings(build("llama"))
    model.set_input_embeddings(torch.nn.Embedding(50, 16))
    noisy = into_first_layer(model)
    with no_noise(model):
        assert not torch.equal(noisy, into_first_layer(model))
    assert names(model) == ["model.embed_tokens"]


def test_a_copy_follows_by_itself():
    model = replace_embeddings(build("llama"))
    twin = copy.deepcopy(model)
    adapter = get_peft_model(twin, TOKENS).train()
    into_first_layer(adapter)
    (_, module, noise), *rest = noisy_modules(adapter)
    assert not rest
    assert module is twin.get_input_embeddings()
    assert noise.settings is hook_of(twin).settings is not hook_of(model).settings
    (_, module, _), *rest = noisy_modules(model)
    assert not rest
    assert module is model.get_input_embeddings()


def test_a_wrapped_model_follows_as_well():
    model = build("llama")
    wrapped = replace_embeddings(torch.nn.DataParallel(model))
    get_peft_model(model, TOKENS).train()
    wrapped(**batch())
    (report,) = describe(wrapped)
    assert report.strategy == "add_noise"
    assert report.last_magnitude is not None


def test_replicas_for_several_devices_are_left_alone():
    """They are other modules than the model's, but there for one pass, and several threads run them at once."""

    def replica_of(module):
        replica = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter)
        replica._modules = {name: replica_of(child) for name, child in module._modules.items()}
        return replica

    model = replace_embeddings(build("llama"))
    hook = hook_of(model)
    replica = replica_of(model)
    assert replica.get_input_embeddings() is not model.get_input_embeddings()
    replica(**batch())
    assert hook.lookup is model.get_input_embeddings()


def test_evaluation_moves_nothing():
    model = replace_embeddings(build("llama"))
    adapter = get_peft_model(model, TOKENS).eval()
    before = set(adapter.get_input_embeddings()._forward_hooks)
    into_first_layer(adapter)
    with torch.no_grad():
        into_first_layer(adapter.train())
    assert set(adapter.get_input_embeddings()._forward_hooks) == before
