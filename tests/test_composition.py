"""Contract: noisy embeddings go wherever plain ones go: transforms, contexts, devices."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_function, nop
from torch import nn

from helpers.bits import differing, equal_bits
from helpers.models import IDS, LLAMA_INPUTS, MASK, WEIGHT, D, gradients, llama, noisy_llama, noisy_module, seeded
from neft_kernels import NEFTuneEmbedding, add_noise, describe, noisy_embedding, set_alpha

BOUNDARIES = torch.tensor([0, 2, 5])


def test_aot_function():
    network = noisy_module()
    upstream = torch.randn(2, 5, D)

    def loss(weight, ids, seed, upstream):
        return (noisy_embedding(ids, weight, 0.1, seed=seed, padding_idx=0) * upstream).sum()

    found = []
    for function in (loss, aot_function(loss, fw_compiler=nop, bw_compiler=nop)):
        weight = network.weight.detach().clone().requires_grad_()
        value = function(weight, IDS, torch.tensor([9]), upstream)
        value.backward()
        found.append((value.detach(), weight.grad))
    assert all(equal_bits(a, b) for a, b in zip(*found, strict=True))


def test_aot_eager_backend_trains_as_eager_does():
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        network = noisy_llama()
        run = torch.compile(network, backend="aot_eager") if compiled else network
        loss = seeded(run, **LLAMA_INPUTS).loss
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(network)})
    assert not differing(*found)


def test_functional_call_and_grad():
    """Other parameters take the place of the model's own, in the noisy embedding too."""
    network = noisy_llama().double()
    parameters = {name: value.detach() * 1.5 for name, value in network.named_parameters()}

    def loss(given):
        return torch.func.functional_call(network, given, kwargs=LLAMA_INPUTS).loss

    value, transformed = seeded(loss, parameters), seeded(torch.func.grad(loss), parameters)
    network.load_state_dict(parameters, strict=False)
    expected = seeded(network, **LLAMA_INPUTS).loss
    expected.backward()
    assert equal_bits(value, expected)
    for name, gradient in gradients(network).items():
        # Under the transform torch differentiates silu by other steps: roundings of 1e-16, in sums of a few hundred terms.
        assert torch.allclose(transformed[name], gradient, rtol=1e-11, atol=1e-14), name


def test_an_ensemble_draws_together_or_apart():
    """vmap over tables: "same" noise or "different" noise, as its randomness says, and neither unasked."""
    module, tables = noisy_module(), {"weight": torch.zeros(3, 50, D)}

    def outputs(randomness):
        call = lambda table: torch.func.functional_call(module, table, (IDS,))  # noqa: E731
        return torch.func.vmap(call, randomness=randomness)(tables)

    same, different = outputs("same"), outputs("different")
    assert torch.equal(same[0], same[1])
    assert all(not torch.equal(different[a], different[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    with pytest.raises(RuntimeError, match="randomness"):
        outputs("error")


def test_after_a_transform_over_masks_there_is_nothing_to_report():
    """What is known inside of it stands for many values at once."""
    module = noisy_module()
    masks = torch.stack([MASK, torch.ones_like(MASK)])
    batched = torch.func.vmap(lambda mask: module(IDS, attention_mask=mask), randomness="different")(masks)
    assert torch.equal((batched != F.embedding(IDS, module.weight)).any(-1), masks.bool())
    assert describe(module)[0].last_magnitude is None


def test_double_backward_through_a_model():
    """The second derivative is that of the plain model at the noisy point."""
    network = llama().double()
    network.set_attn_implementation("eager")
    embedding = network.get_input_embeddings()
    direction = torch.randn(embedding.weight.shape, dtype=torch.float64)

    def second(noisy):
        look_up = (
            (lambda: noisy_embedding(IDS, embedding.weight, 0.1, seed=3))
            if noisy
            else (lambda: F.embedding(IDS, embedding.weight) + noise)
        )
        loss = network(inputs_embeds=look_up(), labels=IDS, use_cache=False).loss
        (first,) = torch.autograd.grad(loss, embedding.weight, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), embedding.weight)[0]

    with torch.no_grad():
        noise = noisy_embedding(IDS, embedding.weight, 0.1, seed=3) - F.embedding(IDS, embedding.weight)
    plain, found = second(False), second(True)
    # The difference of the two points is one rounding, 1e-16; the two layers amplify it by far less than 1e4.
    assert torch.allclose(found, plain, rtol=1e-10, atol=1e-12)
    assert plain.abs().max() > 1e-6


def test_autocast_leaves_the_embedding_alone_and_reaches_what_follows():
    plain, noisy = nn.Embedding(50, D, _weight=WEIGHT.clone()), noisy_module()
    linear = nn.Linear(D, 4)
    outside = seeded(noisy, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = seeded(noisy, IDS)
        assert inside.dtype == plain(IDS).dtype == torch.float32
        assert equal_bits(inside, outside)
        assert equal_bits(add_noise(plain(IDS), 0.1, seed=3), add_noise(WEIGHT[IDS], 0.1, seed=3))
        out = linear(inside)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert noisy.weight.grad.dtype == torch.float32

    found = []
    for network in (noisy_llama(alpha=0.0), llama()):
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(**LLAMA_INPUTS).loss
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(network)})
    assert not differing(*found)


def test_deterministic_algorithms_change_nothing():
    found = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            network = noisy_llama()
            loss = seeded(network, **LLAMA_INPUTS).loss
            loss.backward()
            found.append({"loss": loss.detach(), **gradients(network)})
        finally:
            torch.use_deterministic_algorithms(False)
    assert not differing(*found)


def test_inference_mode_gives_the_plain_model_and_draws_nothing():
    network, plain = noisy_llama(), llama()
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert equal_bits(network(**LLAMA_INPUTS).logits, plain(**LLAMA_INPUTS).logits)
    assert torch.equal(torch.get_rng_state(), state)
    assert describe(network)[0].last_magnitude is None
    loss = seeded(network, **LLAMA_INPUTS).loss  # and afterwards it trains as if nothing had been
    assert equal_bits(loss, seeded(noisy_llama(), **LLAMA_INPUTS).loss)


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        network = noisy_llama()
        embedding = NEFTuneEmbedding(50, D)
        ids = torch.zeros(2, 5, dtype=torch.int64)
        logits = network(ids).logits  # with a mask, transformers looks at its values, and there are none
        assert (logits.device.type, logits.shape) == ("meta", (2, 5, 50))
        out = embedding(ids)
        embedding(ids, attention_mask=ids + 1)
    assert (out.device.type, out.shape) == ("meta", (2, 5, D))
    assert describe(embedding)[0].last_magnitude == (5.0 / (5 * D) ** 0.5,) * 2  # of `out`; a mask here has no values
    out.sum().backward()
    assert embedding.weight.grad.device.type == "meta"
    network.to_empty(device="cpu")
    network.load_state_dict(llama().state_dict())
    network.model.rotary_emb = llama().model.rotary_emb
    assert equal_bits(seeded(network, **LLAMA_INPUTS).loss, seeded(noisy_llama(), **LLAMA_INPUTS).loss)


@pytest.mark.parametrize("default", ["meta", "cpu"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_default_device_plays_no_part(default, backend):
    """Tensors on the CPU get the same noise, whatever device new tensors go to."""

    def everything():
        module = noisy_module(backend=backend)
        outputs = [noisy_embedding(IDS, WEIGHT, 0.1, seed=3, backend=backend)]
        outputs += [add_noise(WEIGHT, 0.1, backend=backend), noisy_embedding(IDS.int(), WEIGHT, 0.1, backend=backend)]
        outputs += [module(IDS), module(IDS, attention_mask=MASK), module(IDS, position_ids=IDS)]
        outputs += [module(IDS[:1], cu_seq_lens=BOUNDARIES)]
        set_alpha(module, 3.0)
        outputs += [module(IDS)]
        outputs[-1].sum().backward()
        return [*outputs, module.weight.grad]

    expected = seeded(everything)
    with torch.device(default):
        inside = seeded(everything)
    torch.set_default_device(default)
    try:
        by_default = seeded(everything)
    finally:
        torch.set_default_device(None)
    for a, b, c in zip(expected, inside, by_default, strict=True):
        assert equal_bits(a, b)
        assert equal_bits(a, c)
