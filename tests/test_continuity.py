"""Contract: a training with noise goes on where it was: resumed, recomputed, copied, forked, or after an error."""

import contextlib
import copy
import dataclasses
import multiprocessing
import pickle

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.bits import differing, equal_bits
from helpers.models import IDS, LLAMA_INPUTS, MASK, WEIGHT, gradients, llama, noisy_llama, noisy_module, rows, seeded
from neft_kernels import NEFTuneCallback, describe, noisy_embedding, patch_transformers
from neft_kernels.ops.registration import OVERLOADS


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
        network = noisy_llama() if how == "replace_embeddings" else llama()
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


def fail(*args):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("where", ["in the op", "before the embedding", "in a layer", "in backward"])
def test_a_failed_pass_leaves_everything_usable(monkeypatch, where):
    """After an error the model, its report and its noise are those of a model that never had one."""
    network, untouched = noisy_llama(), noisy_llama()
    with monkeypatch.context() as patch:
        if where == "in the op":
            backend = describe(network)[0].backend
            patch.setitem(OVERLOADS["noisy_embedding"], backend, fail)
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
        alone = seeded(each.get_input_embeddings(), IDS)  # no mask is left behind
        loss = each(**LLAMA_INPUTS).loss
        loss.backward()
        found.append({"alone": alone.detach(), "loss": loss.detach(), **gradients(each)})
    assert not differing(*found)
    assert describe(network) == describe(untouched)


def test_a_failed_pass_draws_at_most_its_own_seed(monkeypatch):
    """The generator is where a pass that did not fail would have left it."""
    module, fresh = noisy_module(), noisy_module()
    with monkeypatch.context() as patch:
        patch.setitem(OVERLOADS["noisy_embedding"], describe(module)[0].backend, fail)
        with pytest.raises(torch.OutOfMemoryError):
            seeded(module, IDS)
    state = torch.get_rng_state()
    seeded(fresh, IDS)
    assert torch.equal(torch.get_rng_state(), state)


def reports(network):
    """What describe says, but for the ratio, for which a copy measures its embeddings anew."""
    return [dataclasses.replace(report, ratio=None) for report in describe(network)]


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
    assert reports(twin) == reports(network)
