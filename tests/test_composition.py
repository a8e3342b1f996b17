"""Contract: noisy embeddings go wherever plain ones go: compilers, transforms, trainers, processes, failures."""

import contextlib
import copy
import multiprocessing
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import equal_bits
from functorch.compile import aot_function, nop
from test_trainer import D, model, rows
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainerCallback, TrainingArguments

from neft_kernels import (
    NEFTuneCallback,
    NEFTuneEmbedding,
    add_noise,
    describe,
    noisy_embedding,
    ops,
    patch_transformers,
    replace_embeddings,
    set_alpha,
)

IDS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
BOUNDARIES = torch.tensor([0, 2, 5])
WEIGHT = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
LLAMA_INPUTS = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "use_cache": False}


def noisy_llama(alpha=5.0, **options):
    return replace_embeddings(model(), alpha=alpha, **options)


def noisy_module(**options):
    return NEFTuneEmbedding(50, D, _weight=WEIGHT.clone(), **options)


def seeded(call, *args, **kwargs):
    torch.manual_seed(5)
    return call(*args, **kwargs)


def gradients(network):
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def differing(a, b):
    """The names of the tensors that are not equal bit for bit."""
    return [key for key in a.keys() | b.keys() if key not in a or key not in b or not equal_bits(a[key], b[key])]


class Ops(nn.Module):
    """Both ops with the seed as an input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())

    def forward(self, ids, magnitude, seed):
        looked_up = noisy_embedding(ids, self.weight, magnitude, seed=seed, stream=3, first_token=2**40)
        return looked_up, add_noise(looked_up, 0.3, seed=seed)


@pytest.mark.parametrize("strict", [True, False])
class TestExport:
    def test_ops_with_a_seed_tensor(self, strict):
        """The program gives eager's bits for every seed and length."""
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
        inputs = (IDS, torch.rand(IDS.shape), torch.tensor([5]))
        dynamic = ({0: batch, 1: length}, {0: batch, 1: length}, None)
        exported = torch.export.export(Ops(), inputs, dynamic_shapes=dynamic, strict=strict).module()
        for seed, shape in ((5, (2, 5)), (-(2**63), (2, 5)), (7, (3, 11))):
            inputs = (torch.randint(50, shape), torch.rand(shape), torch.tensor([seed]))
            for got, want in zip(exported(*inputs), Ops()(*inputs), strict=True):
                assert equal_bits(got, want)

    @pytest.mark.parametrize("build", [noisy_module, noisy_llama])
    def test_a_model_in_training(self, strict, build):
        """It draws a seed at each call from the default generator, as the eager model does."""
        network = build()
        kwargs = {**LLAMA_INPUTS} if build is noisy_llama else {"attention_mask": MASK}
        args = () if build is noisy_llama else (IDS,)
        exported = torch.export.export(network, args, kwargs, strict=strict).module()
        torch.manual_seed(5)
        first, second = exported(*args, **kwargs), exported(*args, **kwargs)
        eager = seeded(network, *args, **kwargs)
        if build is noisy_llama:
            first, second, eager = first.logits, second.logits, eager.logits
        assert equal_bits(first, eager)
        assert not torch.equal(first, second)


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


def test_double_backward_through_a_model():
    """The second derivative is that of the plain model at the noisy point."""
    network = model().double()
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
    for network in (noisy_llama(alpha=0.0), model()):
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
    network, plain = noisy_llama(), model()
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
    assert (out.device.type, out.shape) == ("meta", (2, 5, D))
    out.sum().backward()
    assert embedding.weight.grad.device.type == "meta"
    network.to_empty(device="cpu")
    network.load_state_dict(model().state_dict())
    network.model.rotary_emb = model().model.rotary_emb
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


def padded_batches():
    """Batches of growing length, with padding; sizes 0 and 1 would be graphs of their own."""
    for length in (6, 9, 14, 23):
        ids = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        yield ids, mask


def test_a_compiled_module_is_one_graph_for_all_masks_and_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = noisy_module()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for ids, mask in padded_batches():
        torch.manual_seed(5)
        first, second = compiled(ids, attention_mask=mask), compiled(ids, attention_mask=mask)
        assert equal_bits(first, seeded(module, ids, attention_mask=mask))
        assert not torch.equal(first, second)
        assert torch.equal((first != F.embedding(ids, module.weight)).any(-1), mask.bool())
        assert counter.frame_count == 1


def llama_batches():
    for ids, mask in padded_batches():
        yield {"input_ids": ids, "attention_mask": mask, "use_cache": False}


@pytest.mark.parametrize("build", [model, noisy_llama])
def test_a_compiled_llama_is_one_graph_for_all_masks_and_lengths(build):
    """As the plain one is."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(build(), fullgraph=True, dynamic=True, backend=counter)
    for inputs in llama_batches():
        compiled(**inputs)
        assert counter.frame_count == 1


def test_a_compiled_llama_has_the_noise_of_the_eager_one():
    """Fresh at each call, eager's for eager's seed, with alpha as it is set at the time, in one graph."""
    torch._dynamo.reset()
    network, eager = noisy_llama(), noisy_llama()
    set_alpha(network, 5.0)  # once it has been set at run time, alpha is an input of the graph
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    for alpha, inputs in zip((5.0, 1.0, 20.0, 0.0), llama_batches(), strict=True):
        for each in (network, eager):
            set_alpha(each, alpha)
        torch.manual_seed(5)
        first, second = compiled(**inputs).logits, compiled(**inputs).logits
        assert equal_bits(first, seeded(eager, **inputs).logits)
        assert torch.equal(first, second) == (alpha == 0)
    assert counter.frame_count == 1


def test_reduce_overhead_on_the_cpu():
    torch._dynamo.reset()
    module = noisy_module()
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    first, second = compiled(IDS), compiled(IDS)
    bound = describe(module)[0].alpha / (5 * D) ** 0.5
    for out in (first, second):
        assert 0 < (out - F.embedding(IDS, module.weight)).abs().max() <= bound + 1e-6
    assert not torch.equal(first, second)
    first.sum().backward()
    assert module.weight.grad[3].tolist() == [1.0] * D


def schedule(step):
    return 2.0 + step


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("how", ["replace_embeddings", "callback", "callback with a schedule", "patch_transformers"])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, how):
    """A run that stops at a checkpoint and goes on in a new Trainer ends with the weights of one that does not stop."""

    def train(folder, stop_at=None, resume=False):
        network = noisy_llama() if how == "replace_embeddings" else model()
        option = {"neftune_noise_alpha": 5.0} if how == "patch_transformers" else {}
        arguments = TrainingArguments(
            str(tmp_path / folder),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            seed=3,
            **option,
        )
        callbacks = [StopAt(stop_at)]
        if how.startswith("callback"):
            callbacks.append(NEFTuneCallback(schedule if "schedule" in how else 5.0))
        Trainer(network, arguments, train_dataset=rows(), callbacks=callbacks).train(resume_from_checkpoint=resume)
        return network.state_dict()

    with patch_transformers() if how == "patch_transformers" else contextlib.nullcontext():
        whole, half, resumed = train("whole"), train("parts", stop_at=3), train("parts", resume=True)
    assert differing(half, whole)
    assert not differing(resumed, whole)


@pytest.mark.parametrize("embedding_trained", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_give_the_same_bits(use_reentrant, embedding_trained):
    found = []
    for checkpointed in (False, True):
        network = noisy_llama()
        network.get_input_embeddings().weight.requires_grad_(embedding_trained)
        if not embedding_trained:
            network.enable_input_require_grads()
        if checkpointed:
            network.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss = seeded(network, **LLAMA_INPUTS).loss
        loss.backward()
        grads = {name: grad for name, grad in gradients(network).items() if grad is not None}
        found.append({"loss": loss.detach(), "next draw": torch.rand(1), **grads})
    assert not differing(*found)
    assert ("model.embed_tokens.weight" in found[0]) == embedding_trained


class Noisy(torch.utils.data.Dataset):
    """Rows of noise, made where the loader asks for them."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return noisy_embedding(IDS, WEIGHT, 0.1, seed=index, first_token=2**33)


def test_workers_of_a_data_loader_make_the_same_noise():
    expected = [Noisy()[index] for index in range(4)]
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for got, want in zip(loader, expected, strict=True):
        assert equal_bits(got, want)


def test_a_forked_child_goes_on_like_its_parent():
    """A child made in the middle of training continues with the parent's bits, forward and backward.

    Small tensors: on large ones a child hangs in any op of torch, if the parent ran some on two threads.
    """
    module = noisy_module()
    seeded(module, IDS).sum().backward()
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)

    def step():
        module.zero_grad()
        out = module(IDS, attention_mask=MASK)
        out.square().sum().backward()
        return {"out": out.detach(), "grad": module.weight.grad}

    def child():
        writer.send_bytes(pickle.dumps({key: value.numpy() for key, value in step().items()}))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    writer.close()
    try:
        assert reader.poll(120), "the child hangs"
        found = pickle.loads(reader.recv_bytes())
    finally:
        process.kill()
        process.join()
    assert not differing({key: torch.from_numpy(value) for key, value in found.items()}, step())


def failing_op(*args):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("where", ["in the op", "before the embedding", "in a layer", "in backward"])
def test_a_failed_pass_leaves_everything_usable(monkeypatch, where):
    """After an error the model, its report and its noise are those of a model that never had one."""
    network, untouched = noisy_llama(), noisy_llama()

    def fail(*args):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        if where == "in the op":
            backend = describe(network)[0].backend
            patch.setitem(ops.OVERLOADS["noisy_embedding"], backend, fail)
        elif where == "before the embedding":
            handle = network.get_input_embeddings().register_forward_pre_hook(fail)
        elif where == "in a layer":
            handle = network.model.layers[1].register_forward_pre_hook(fail)
        else:
            handle = network.model.layers[1].register_full_backward_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            network(**LLAMA_INPUTS).loss.backward()
        if where != "in the op":
            handle.remove()
    network.zero_grad()
    assert describe(network)[0].state == "on"
    found = []
    for each in (network, untouched):
        loss = seeded(each, **LLAMA_INPUTS).loss
        loss.backward()
        unmasked = each(input_ids=IDS[:, :3]).logits  # no mask is left behind
        found.append({"loss": loss.detach(), "unmasked": unmasked.detach(), **gradients(each)})
    assert not differing(*found)
    assert describe(network) == describe(untouched)


def test_a_failed_pass_draws_at_most_its_own_seed(monkeypatch):
    """The generator is where a pass that did not fail would have left it."""
    module, fresh = noisy_module(), noisy_module()
    with monkeypatch.context() as patch:
        patch.setitem(ops.OVERLOADS["noisy_embedding"], describe(module)[0].backend, failing_op)
        with pytest.raises(torch.OutOfMemoryError):
            seeded(module, IDS)
    state = torch.get_rng_state()
    seeded(fresh, IDS)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("alpha", [5.0, schedule], ids=["number", "schedule"])
def test_a_copy_made_in_the_middle_of_training_goes_on_alike(copier, alpha):
    network = noisy_llama(alpha)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)

    def steps(network, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            network(**LLAMA_INPUTS).loss.backward()
            optimizer.step()

    seeded(steps, network, optimizer, 2)
    twin, twin_optimizer = copier((network, optimizer))
    assert twin_optimizer.param_groups[0]["params"][0] is next(twin.parameters())
    seeded(steps, network, optimizer, 3)
    assert differing(dict(twin.named_parameters()), dict(network.named_parameters()))
    seeded(steps, twin, twin_optimizer, 3)
    assert not differing(dict(twin.named_parameters()), dict(network.named_parameters()))
    assert describe(twin) == describe(network)
