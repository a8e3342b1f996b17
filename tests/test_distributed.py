"""Contract: many processes train as one would, on torch's own engines: real processes, started by torchrun, with gloo.

Starting processes is what takes time, so each run is one launch with many checks, in ``distributed_runs/``.
"""

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from neft_kernels import (
    NEFTuneCallback,
    NEFTuneEmbedding,
    add_noise,
    noise_magnitude,
    noisy_embedding,
    replace_embeddings,
)
from neft_kernels.models.sharding import Part, in_parts

PROGRAMS = Path(__file__).parent / "distributed_runs"
TIME_LIMIT = 600  # seconds; what hangs fails


def launch(processes, program, *args):
    """The output of all processes, once torchrun has ended, and its exit status."""
    path = os.pathsep.join(filter(None, (str(PROGRAMS.parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    process = subprocess.Popen(
        [*torchrun, PROGRAMS / program, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends the others
        output, _ = process.communicate()
        pytest.fail(f"not done after {TIME_LIMIT} seconds:\n{output}")
    return output, process.returncode


def passed(output, status):
    """The names of the checks that passed, of a run in which all did."""
    assert status == 0, output
    return [line.split()[1] for line in output.splitlines() if line.startswith("ok: ")]


def test_two_and_four_processes(tmp_path):
    """Sequence and tensor parallelism, replicas, DDP, FSDP2, torch.compile; the Trainer and accelerate with DDP and FSDP2.

    Then the same with meshes of two dimensions, and a checkpoint of two processes resumed by four.
    """
    modules = ("sequence_parallel", "tensor_parallel", "training", "compiled", "trainers")
    names = passed(*launch(2, "run.py", tmp_path, *modules))
    assert "training.save" in names
    assert {name.partition(".")[0] for name in names} == set(modules)
    names = passed(*launch(4, "run.py", tmp_path, "sequence_parallel", "tensor_parallel", "training"))
    assert "training.resume" in names


def test_a_rank_that_fails_ends_the_run():
    """An id out of range is that rank's own IndexError; the other rank, which waits for it, is ended by torchrun."""
    output, status = launch(2, "failing.py")
    assert status != 0
    assert "IndexError: input_ids[0, 2] is 99, but ids must be in [0, 50), the rows of weight" in output
    assert "unreachable" not in output


class Around(nn.Module):
    """A model that waits for another thread between being told of its sequences and looking them up."""

    def __init__(self, barrier):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.barrier = barrier

    def forward(self, input_ids, attention_mask):
        self.barrier.wait(timeout=60)
        embeds = self.embed(input_ids)
        self.barrier.wait(timeout=60)
        return embeds


@pytest.mark.parametrize("models", [1, 2])
def test_threads_have_masks_of_their_own(models):
    """Two threads, in one model or in two, are both inside of their pass when they look up: each has its own lengths."""
    barrier = threading.Barrier(2)
    networks = [replace_embeddings(Around(barrier), 5.0) for _ in range(models)]
    tokens = torch.arange(24).view(2, 12)
    masks = [torch.ones(2, 12, dtype=torch.int64), torch.tensor([[1] * 3 + [0] * 9, [1] * 7 + [0] * 5])]
    bounds, failed = {}, []

    def work(number):
        try:
            torch.set_grad_enabled(True)
            network = networks[number % models]
            for _ in range(5):
                embeds = network(tokens, masks[number])
                noise = (embeds - network.embed.weight[tokens]).detach().abs()
                bounds.setdefault(number, []).append(noise.amax(-1))
        except Exception as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for number, mask in enumerate(masks):
        magnitude = noise_magnitude(tokens, 16, 5.0, attention_mask=mask)
        for largest in bounds[number]:
            assert (largest <= magnitude + 1e-6).all()  # the lookup's rounding: entries are below 5, eps 2**-23 * 4
            # Of 16 uniform numbers the largest is below a half with probability 2**-16; the other mask's bound differs more.
            assert (largest[magnitude > 0] > magnitude[magnitude > 0] / 4).all()
            assert (largest[magnitude == 0] == 0).all()


def test_replicas_of_data_parallel():
    """What DataParallel's threads run: shallow copies of the modules, whose noise and masks are those of the model."""
    network = replace_embeddings(nn.Sequential(nn.Embedding(50, 16)), 5.0)
    replicas = []
    for module in (network, network[0]):
        replicas.append(module._replicate_for_data_parallel())
    replicas[0]._modules["0"] = replicas[1]
    replicas[1].weight = network[0].weight  # replicate() puts a differentiable copy of it there
    tokens = torch.arange(12).view(2, 6)
    torch.manual_seed(3)
    want = network(tokens)
    torch.manual_seed(3)
    assert torch.equal(replicas[0](tokens), want)
    assert not torch.equal(want, network[0].weight[tokens])


PARTS = {
    "contiguous": Part(8, ((2, 4),)),
    "head and tail": Part(8, ((1, 3), (5, 7))),
    "tail before head": Part(8, ((6, 8), (0, 2), (3, 5))),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_slice_of_a_part_is_the_part_of_those_tokens(name):
    part, whole = PARTS[name], torch.arange(16).view(2, 8)
    held = part.of(whole)
    assert held.shape[-1] == sum(end - begin for begin, end in part.pieces)
    for begin in range(held.shape[-1] + 1):
        for end in range(begin, held.shape[-1] + 1):
            assert torch.equal(part.slice(begin, end).of(whole), held[..., begin:end])


@pytest.mark.parametrize("shape", [(8,), (1, 8), (3, 8), (2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_noise_on_a_part_is_that_part_of_the_noise_on_the_whole(name, shape):
    part, embeds = PARTS[name], torch.randn(*shape, 5)
    per_token = torch.rand(shape)
    for magnitude in (0.3, torch.tensor(0.3), per_token):
        seed = torch.tensor([3])
        whole = add_noise(embeds, magnitude, seed=seed, stream=2)
        held = part.of(magnitude) if isinstance(magnitude, torch.Tensor) and magnitude.ndim else magnitude
        options = {"magnitude": held, "seed": seed, "stream": 2}
        noisy = in_parts(part, part.of(embeds.mT).mT, **options)
        assert torch.equal(noisy, part.of(whole.mT).mT)


def test_sequence_group_needs_initialised_processes():
    with pytest.raises(ValueError, match=r"sequence_group needs torch\.distributed\.init_process_group\(\) first"):
        replace_embeddings(nn.Sequential(nn.Embedding(5, 4)), sequence_group="a group")


@pytest.fixture
def one_process(tmp_path):
    """torch.distributed with this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_bad_sequence_groups():
    """The message names the argument, what was expected and what came; the model stays as it was."""
    model = nn.Sequential(nn.Embedding(5, 4))
    squares = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp"))
    with pytest.raises(
        TypeError, match=r"sequence_group must be a ProcessGroup or a DeviceMesh of one dimension, not .*dp"
    ):
        replace_embeddings(model, sequence_group=squares)
    with pytest.raises(TypeError, match=r"sequence_group must be .*, not 'cp'"):
        NEFTuneEmbedding(5, 4, sequence_group="cp")
    with pytest.raises(ValueError, match="sequence_layout must be one of contiguous, head_tail, not 'zigzag'"):
        replace_embeddings(model, sequence_group=squares["cp"], sequence_layout="zigzag")
    assert type(model[0]) is nn.Embedding
    replace_embeddings(model, sequence_group=squares["cp"], sequence_layout="head_tail")
    for noisy in (model, NEFTuneEmbedding(5, 4, sequence_group=squares["cp"], sequence_layout="head_tail")):
        with pytest.raises(ValueError, match="'head_tail' needs an even number of tokens on each rank, not 3"):
            noisy(torch.tensor([1, 2, 3]))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("layout", ["contiguous", "head_tail"])
def test_a_group_of_one_is_no_group(layout):
    """One rank holds the whole: the noise is that without a group, in all that takes one."""
    group = dist.group.WORLD
    tokens = torch.arange(8).view(2, 4)
    embedding = NEFTuneEmbedding(50, 16, sequence_group=group, sequence_layout=layout)
    torch.manual_seed(3)
    want = noisy_embedding(tokens, embedding.weight, noise_magnitude(tokens, 16, 5.0))
    torch.manual_seed(3)
    assert torch.equal(embedding(tokens), want)
    assert torch.equal(copy.deepcopy(embedding).weight, embedding.weight)

    callback = NEFTuneCallback(5.0, sequence_group=group, sequence_layout=layout)
    model = nn.Sequential(nn.Embedding(50, 16, _weight=embedding.weight.detach()))
    callback.on_train_begin(None, None, None, model=model)
    torch.manual_seed(3)
    assert torch.equal(model(tokens), want)
    assert model[0].noise.model_noise.options.sequence_layout == layout
