"""Contract: the Trainer and accelerate, on several processes, have each rank's noise, once, while they train."""

import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from common import WIDTH, ids, llama
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from neft_kernels import (
    NEFTuneCallback,
    describe,
    noise_magnitude,
    noisy_embedding,
    patch_transformers,
    replace_embeddings,
)

rank, ranks = dist.get_rank(), dist.get_world_size()
ALPHA = 5.0


class Witness:
    """Computes what an embedding should return before it does, with the same seed, and counts."""

    def __init__(self, embedding):
        self.seen = 0
        self.handles = (
            embedding.register_forward_pre_hook(self.before),
            embedding.register_forward_hook(self.after),
        )

    def before(self, module, args):
        state = torch.get_rng_state()
        magnitude = noise_magnitude(*args, WIDTH, ALPHA)
        self.want = noisy_embedding(*args, module.weight.detach(), magnitude, stream=rank)
        torch.set_rng_state(state)

    def after(self, module, args, output):
        assert torch.equal(output, self.want)
        self.seen += 1

    def remove(self):
        for handle in self.handles:
            handle.remove()


class Watch(TrainerCallback):
    """A witness on the embedding of the Trainer's model, from the first step to the last."""

    witness = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.witness is None:
            self.witness = Witness(model.get_input_embeddings())

    def on_train_end(self, args, state, control, **kwargs):
        self.witness.remove()


def trainer(name, callbacks, **options):
    arguments = TrainingArguments(
        f"{sys.argv[1]}/{name}",
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids(6 * ranks, 9).tolist()]
    return Trainer(llama(), arguments, train_dataset=rows, callbacks=callbacks)


def assert_noisy_for_three_steps(run, watch):
    run.train()
    assert isinstance(run.model_wrapped, DistributedDataParallel)
    assert watch.witness.seen == 3
    embedding = run.model.get_input_embeddings()
    assert type(embedding) is nn.Embedding
    assert not embedding._forward_hooks


def trainer_with_the_callback():
    watch = Watch()
    assert_noisy_for_three_steps(trainer("callback", [NEFTuneCallback(ALPHA), watch]), watch)


def trainer_with_its_own_option():
    watch = Watch()
    with patch_transformers():
        assert_noisy_for_three_steps(trainer("option", [watch], neftune_noise_alpha=ALPHA), watch)


def accelerated(wrapper, configure=lambda accelerator: None):
    """Two steps of a model in the `wrapper` that accelerate puts it into, made noisy before that and after it."""
    for replace_first in (True, False):
        accelerator = Accelerator(cpu=True)
        configure(accelerator)
        model = llama()
        if replace_first:
            replace_embeddings(model, ALPHA)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(model, wrapper)
        if not replace_first:
            replace_embeddings(model, ALPHA)
        steps(accelerator, model, optimizer)
        AcceleratorState._reset_state()


def accelerate_with_ddp():
    accelerated(DistributedDataParallel)


def accelerate_with_fsdp2():
    def shard(accelerator):
        # Without an accelerator accelerate ignores the plugin, though what it does with it runs on CPUs.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        accelerator.state.distributed_type = DistributedType.FSDP

    accelerated(FSDPModule, shard)


def steps(accelerator, model, optimizer):
    witness = Witness(accelerator.unwrap_model(model).get_input_embeddings())
    for step in range(2):
        tokens = ids(2, 9, seed=ranks * step + rank)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert witness.seen == 2
    assert [report.state for report in describe(model)] == ["on"]


CHECKS = [trainer_with_the_callback, trainer_with_its_own_option, accelerate_with_ddp, accelerate_with_fsdp2]
