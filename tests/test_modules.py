"""Contract: NEFTuneEmbedding is nn.Embedding, plus noise in training with gradients enabled."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.devices import CPU_BACKENDS
from neft_kernels import NEFTuneEmbedding, describe, noise_magnitude, noisy_embedding, replace_embeddings
from neft_kernels.ops.registration import OVERLOADS

IDS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def embedding(**options):
    torch.manual_seed(0)
    return NEFTuneEmbedding(10, 6, padding_idx=0, **options)


def noise_of(module, *args, **kwargs):
    return module(*args, **kwargs) - nn.functional.embedding(args[0], module.weight)


def test_training_forward_is_noisy_embedding_with_a_seed_from_the_default_generator():
    module = embedding(alpha=3.0)
    torch.manual_seed(5)
    out = module(IDS)
    torch.manual_seed(5)
    magnitude = noise_magnitude(IDS, 6, 3.0)
    assert torch.equal(out, noisy_embedding(IDS, module.weight, magnitude))
    assert 0 < noise_of(module, IDS).abs().max() <= magnitude * (1 + 1e-6)


@pytest.mark.parametrize("why", ["eval", "no_grad", "inference", "alpha"])
def test_off_means_the_plain_embedding_and_no_draw(why):
    module = embedding(alpha=0.0 if why == "alpha" else 5.0)
    module.train(why != "eval")
    state = torch.get_rng_state()
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(why, torch.enable_grad)
    with context():
        assert torch.equal(module(IDS), nn.functional.embedding(IDS, module.weight))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_single_id_gets_no_noise():
    module = embedding()
    assert torch.equal(module(torch.tensor(3)), module.weight[3])


def test_masks_reach_the_magnitude():
    module = embedding()
    noise = noise_of(module, IDS, attention_mask=MASK)
    assert torch.equal(noise == 0, (MASK == 0)[..., None].expand(2, 4, 6))
    with pytest.raises(ValueError, match="attention_mask"):
        module(IDS, attention_mask=MASK[:, :3])
    batch = embedding(scale_by="batch")
    assert (noise_of(batch, IDS, attention_mask=MASK) != 0).all()


def test_noise_on_the_chosen_tokens_only():
    labels = torch.tensor([[-100, 2, 3, -100], [-100, -100, 5, 6]])
    for noise_on, noisy in (("prompt", labels == -100), ("completion", labels != -100)):
        module = embedding(noise_on=noise_on)
        assert torch.equal((noise_of(module, IDS, labels=labels) != 0).any(-1), noisy)
        with pytest.raises(ValueError, match=f"noise_on='{noise_on}' needs labels"):
            module(IDS)


def test_a_batch_of_nothing_but_padding():
    module = embedding()
    assert not noise_of(module, IDS, attention_mask=torch.zeros_like(MASK)).any()
    assert describe(module)[0].last_magnitude == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_a_batch_without_tokens(shape):
    module, plain = embedding(), nn.Embedding(10, 6)
    ids = torch.zeros(shape, dtype=torch.int64)
    out = module(ids)
    assert out.shape == plain(ids).shape
    out.sum().backward()
    assert not module.weight.grad.any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_backend_asked_for_is_the_one_that_computes(backend, monkeypatch):
    """The noise and, where it has a kernel for them, the magnitudes."""
    ran = set()
    for op, overloads in OVERLOADS.items():
        for name, overload in overloads.items():

            def note(*args, op=op, name=name, overload=overload):
                ran.add((op, name))
                return overload(*args)

            monkeypatch.setitem(overloads, name, note)

    class Doubled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    replaced = replace_embeddings(nn.Sequential(nn.Embedding(10, 6)), backend=backend)
    doubled = replace_embeddings(nn.Sequential(Doubled(10, 6)), backend=backend)
    computed = (
        {"noisy_embedding", "token_magnitude"} if backend in OVERLOADS["token_magnitude"] else {"noisy_embedding"}
    )
    for module, args, expected in (
        (embedding(backend=backend), {"attention_mask": MASK}, computed),
        (replaced, {}, {"noisy_embedding"}),
        (doubled, {}, {"add_noise"}),
    ):
        ran.clear()
        module(IDS, **args)
        assert ran == {(op, backend) for op in expected}


@pytest.mark.cpu_extension
def test_what_describe_says_for_people():
    module = embedding(stream=7, backend="reference")
    begin = (
        "(the model itself) (NEFTuneEmbedding): noise on; alpha=5 by sequence, fused on backend 'reference', stream 7; "
    )
    assert str(describe(module)) == begin + "no noisy batch recorded yet (compiled models record none)"
    module(IDS)
    assert str(describe(module)) == begin + (
        "last batch within +-1.02, 0.599 of the embeddings (strong: above 0.5 it may drown the tokens; choose a smaller "
        "alpha) [no mask or positions were given, so each row of [2, 4] ids counts in full length]"
    )  # 5 / sqrt(4 * 6)
    module(IDS, attention_mask=MASK)
    assert str(describe(module)) == begin + (
        "last batch within +-1.18 to 1.44 by sequence, 0.758 of the embeddings (strong: above 0.5 it may drown the tokens; "
        "choose a smaller alpha)"
    )  # of 3 and 2 tokens
    module = nn.Sequential(embedding(noise_on="prompt", scale_by="batch")).eval()
    assert str(describe(module)) == (
        "0 (NEFTuneEmbedding): noise off: evaluation mode; alpha=5 by batch on the prompt, fused on backend 'cpu', "
        "stream of this replica; no noisy batch recorded yet (compiled models record none)"
    )


def test_gradient_honours_the_options_of_the_embedding():
    for options in ({}, {"scale_grad_by_freq": True}, {"sparse": True}):
        torch.manual_seed(0)
        noisy = NEFTuneEmbedding(10, 6, padding_idx=0, **options)
        plain = nn.Embedding(10, 6, padding_idx=0, _weight=noisy.weight.detach().clone(), **options)
        noisy(IDS).sum().backward()
        plain(IDS).sum().backward()
        assert torch.equal(noisy.weight.grad.to_dense(), plain.weight.grad.to_dense())
        assert noisy.weight.grad.is_sparse == plain.weight.grad.is_sparse


def test_streams_draw_different_noise_from_one_seed():
    noises = []
    for stream in (0, 1):
        torch.manual_seed(5)
        noises.append(noise_of(embedding(stream=stream), IDS))
    torch.manual_seed(5)
    assert not torch.equal(*noises)
    assert torch.equal(noise_of(embedding(), IDS), noises[0])  # without torch.distributed the stream is 0


def test_it_is_an_nn_embedding():
    module = embedding()
    assert isinstance(module, nn.Embedding)
    assert list(module.state_dict()) == ["weight"]
    plain = nn.Embedding(10, 6)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(plain.weight, module.weight)
    table = torch.randn(4, 3)
    assert torch.equal(NEFTuneEmbedding.from_pretrained(table).weight, table)
    for freeze in (True, False):
        assert NEFTuneEmbedding.from_pretrained(table, freeze=freeze).weight.requires_grad != freeze
    assert NEFTuneEmbedding(4, 3, dtype=torch.bfloat16, device="meta").weight.device.type == "meta"


def test_copies_and_pickles_are_independent():
    module = embedding(alpha=7.0)
    module(IDS, attention_mask=MASK)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.noise is not module.noise
        assert twin.noise.model_noise.options == module.noise.model_noise.options
        assert twin.noise.last_magnitude is None
        torch.manual_seed(1)
        expected = module(IDS)
        torch.manual_seed(1)
        assert torch.equal(twin(IDS), expected)


def test_activation_checkpointing_recomputes_the_same_noise():
    module, head = embedding(), nn.Linear(6, 3)

    def block(x):
        return torch.tanh(head(x + module(IDS)))

    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(3)
        module.zero_grad()
        x = torch.ones(2, 4, 6, requires_grad=True)
        run(x).square().sum().backward()
        gradients.append((module.weight.grad.clone(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
