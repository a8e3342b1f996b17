"""Contract: DDP and FSDP2 train as one process does that is given the streams and seeds of all replicas; FSDP2 resumes."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import VOCAB, ids, llama
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from neft_kernels import describe, replace_embeddings, restore_embeddings

rank, ranks = dist.get_rank(), dist.get_world_size()
STEPS = 20
SYMMETRIC = {"symmetric": True, "noise": "sign"}
CHECKPOINT = Path(sys.argv[1]) / "checkpoint"


def training_batch(step, replica):
    """Two rows, the second of them padded on the right, of the same tokens in each step of the same name."""
    tokens = ids(2, 10, seed=100 * step + replica)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def trained(model, optimizer, steps=range(STEPS)):
    """The losses of this replica."""
    losses = []
    for step in steps:
        torch.manual_seed(step)  # all replicas alike
        loss = model(**training_batch(step, rank)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained_by_one_process(model, dtype=torch.float32, **options):
    """All replicas, one after the other, with parameters that are cast to `dtype` while they compute; losses of `rank`.

    `options` are those of replace_embeddings().
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        gradients = []
        for replica in range(ranks):
            twin = copy.deepcopy(model)
            for parameter in twin.parameters():
                parameter.data = parameter.data.to(dtype)
            replace_embeddings(twin, stream=replica, **options)
            torch.manual_seed(step)
            loss = twin(**training_batch(step, replica)).loss
            loss.backward()
            gradients.append([parameter.grad for parameter in twin.parameters()])
            if replica == rank:
                losses.append(loss.item())
        for parameter, *both in zip(model.parameters(), *gradients, strict=True):
            # Of two numbers the sum does not depend on the order, and halving is exact, before and after.
            parameter.grad = (sum(both) / ranks).float()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def sharded(model, policy=None):
    policy = policy or MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model.model.embed_tokens, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def assert_equal_weights(state, reference):
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
    assert whole.keys() == reference.state_dict().keys()
    for name, value in reference.state_dict().items():
        assert torch.equal(whole[name], value), name


def ddp_trains_as_one_process():
    for options in ({}, SYMMETRIC):
        reference, model = llama(), llama()
        losses = trained_by_one_process(reference, **options)
        # The Trainer looks for unused parameters.
        wrapped = DistributedDataParallel(replace_embeddings(model, **options), find_unused_parameters=bool(options))
        assert trained(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-2)) == losses
        assert_equal_weights(model.state_dict(), reference)
        assert losses[-1] < losses[0]


def fsdp2_trains_as_one_process():
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {}), (torch.float32, SYMMETRIC)):
        reference = llama()
        losses = trained_by_one_process(reference, dtype, **options)
        model = sharded(replace_embeddings(llama(), **options), MixedPrecisionPolicy(param_dtype=dtype))
        assert trained(model, torch.optim.AdamW(model.parameters(), lr=1e-2)) == losses, dtype
        assert_equal_weights(model.state_dict(), reference)
        without_noise = sharded(llama(), MixedPrecisionPolicy(param_dtype=dtype))
        assert trained(without_noise, torch.optim.AdamW(without_noise.parameters(), lr=1e-2)) != losses


def noise_needs_no_memory_of_its_own():
    """Peak of all tensors alive in a step, by torch's own tracker. The ids, the magnitudes and the seeds of the last passes
    are kept; a magnitude is one number for a token.
    """
    peaks = {}
    for noisy in (False, True):
        model = llama()
        model = sharded(replace_embeddings(model) if noisy else model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        trained(model, optimizer, range(1))  # the optimizer's state is there
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            trained(model, optimizer, range(1, 2))
        peaks[noisy] = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert peaks[False] > sum(parameter.to_local().nbytes for parameter in model.parameters())
    passes, tokens = 2, training_batch(0, 0)["input_ids"].numel()
    assert peaks[True] <= peaks[False] + passes * (8 * tokens + 4 * tokens + 8), peaks


def copies_of_wrapped_models():
    """A copy of the module in DDP, as an EMA makes one, has settings of its own; FSDP2 refuses copies, noise or not."""
    wrapped = DistributedDataParallel(replace_embeddings(llama()))
    twin = copy.deepcopy(wrapped).module
    restore_embeddings(wrapped.module)
    reference = replace_embeddings(llama(), stream=rank)
    losses = []
    for model in (twin, reference, wrapped):
        torch.manual_seed(0)
        losses.append(model(**training_batch(0, rank)).loss.item())
    assert losses[0] == losses[1] != losses[2]
    for model in (llama(), replace_embeddings(llama())):
        with pytest.raises(AssertionError, match="FSDP does not support deepcopy"):
            copy.deepcopy(sharded(model))


def save():
    model = sharded(replace_embeddings(llama()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=CHECKPOINT)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(whole, CHECKPOINT / "whole.pt")


def resume():
    """On another number of processes: the weights of the checkpoint, and noise of as many streams as there are now."""
    model = sharded(replace_embeddings(llama()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=CHECKPOINT)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    reference = llama()
    reference.load_state_dict(torch.load(CHECKPOINT / "whole.pt"))
    assert_equal_weights(model.state_dict(), reference)
    replace_embeddings(reference, stream=rank)
    torch.manual_seed(3)
    want = reference(**training_batch(3, rank)).loss.item()
    assert trained(model, optimizer, range(3, 4)) == [want]
    assert [report.state for report in describe(model)] == ["on"]
    assert model.model.embed_tokens.num_embeddings == VOCAB


CHECKS = (
    [
        ddp_trains_as_one_process,
        fsdp2_trains_as_one_process,
        noise_needs_no_memory_of_its_own,
        copies_of_wrapped_models,
        save,
    ]
    if ranks == 2
    else [resume]
)
