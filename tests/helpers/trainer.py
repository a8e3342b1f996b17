"""The Trainer on a small model, a callback that records what describe() says, and transformers' own hook."""

from types import SimpleNamespace

import transformers
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.models import rows
from neft_kernels import describe
from neft_kernels.integrations.trainer import _own_hook


def trainer(tmp_path, network, callbacks=(), cls=Trainer, **options):
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        **options,
    )
    return cls(network, arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks))


class Look(TrainerCallback):
    """Notes what describe() says, and how the embedding is hooked, in the middle of training."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.reports, self.hooks, self.fail_at, self.error = [], [], fail_at, error

    def on_step_end(self, args, state, control, **kwargs):
        network = kwargs["model"]
        self.reports.append(describe(network))
        self.hooks.append(len(network.get_input_embeddings()._forward_hooks))
        if state.global_step == self.fail_at:
            raise self.error


def own_hook():
    """What puts transformers' own hook on and takes it off, at this moment."""
    owner, names = _own_hook()
    return tuple(getattr(owner, name) for name in names)


def activate(network, alpha, accelerator=None):
    """Does what the Trainer does before it trains; returns the handle."""
    put_on, _ = own_hook()
    if _own_hook()[0] is transformers.trainer:
        return put_on(network, alpha, accelerator)
    accelerator = accelerator or SimpleNamespace(unwrap_model=lambda given: given)
    holder = SimpleNamespace(neftune_noise_alpha=alpha, accelerator=accelerator)
    assert put_on(holder, network) is network
    return holder.neftune_hook_handle


def deactivate(network, handle, accelerator=None):
    """Does what the Trainer does after it has trained."""
    _, take_off = own_hook()
    if _own_hook()[0] is transformers.trainer:
        take_off(network, handle, accelerator)
    else:
        accelerator = accelerator or SimpleNamespace(unwrap_model=lambda given: given)
        take_off(SimpleNamespace(neftune_hook_handle=handle, accelerator=accelerator), network)


def is_plain(network):
    embedding = network.get_input_embeddings()
    return type(embedding) is nn.Embedding and not embedding._forward_hooks and not network._forward_pre_hooks
