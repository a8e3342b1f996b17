"""Records what each noisy embedding of a model adds in a pass, and what a model is made of."""

import inspect
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from neft_kernels import describe, no_noise


class Outline:
    """What restore_embeddings() has to bring back, by the name of the module or parameter."""

    def __init__(self, model):
        modules = dict(model.named_modules(remove_duplicate=False))
        self.classes = {name: type(module) for name, module in modules.items()}
        self.attributes = {name: set(vars(module)) for name, module in modules.items()}
        self.hooks = {name: _count_hooks(module) for name, module in modules.items()}
        self.parameters = {name: id(each) for name, each in model.named_parameters(remove_duplicate=False)}

    def differences(self, other):
        return [
            (what, name, ours.get(name), theirs.get(name))
            for what, ours, theirs in zip(vars(self), vars(self).values(), vars(other).values(), strict=True)
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]


def _count_hooks(module):
    return {
        name: len(value) for name, value in vars(module).items() if name.endswith("_hooks") and isinstance(value, dict)
    }


class Call(NamedTuple):
    """One call of a noisy embedding."""

    name: str
    ids: torch.Tensor
    noise: torch.Tensor  # what it adds to the output
    largest: float  # of the output without it


class Recorder(TorchFunctionMode):
    """Watches the noisy embeddings of a model, and all look-ups in the input embeddings that none of them does."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inside = model, 0
        self.calls, self.plain_look_ups = [], []
        self.tables = {id(table) for module in input_embeddings(model) for table in module.parameters()}

    def __enter__(self):
        self.handles = []
        for report in describe(self.model):
            module = self.model.get_submodule(report.name)
            self.handles += [
                module.register_forward_pre_hook(self.entered, prepend=True),
                module.register_forward_hook(self.left(report.name), with_kwargs=True),  # sees the noise of other hooks
            ]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.embedding:
            given = inspect.signature(func).bind(*args, **(kwargs or {})).arguments
            if id(given["weight"]) in self.tables and given["input"].ndim and not self.inside:
                self.plain_look_ups.append(given["input"])
        return func(*args, **(kwargs or {}))

    def entered(self, module, args):
        self.inside += 1

    def left(self, name):
        def hook(module, args, kwargs, output):
            ids = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            with no_noise(self.model), torch.no_grad():
                clean = module.forward(*args, **kwargs)
            noisy, clean = (each[0] if isinstance(each, tuple) else each for each in (output, clean))
            self.calls.append(Call(name, ids.detach().clone(), noisy.detach() - clean, clean.abs().max().item()))
            self.inside -= 1

        return hook


def input_embeddings(model):
    """The modules that look up the ids a model is given: those of the encoder and the decoder, where it has both."""
    try:
        found = [model.get_input_embeddings()]
    except NotImplementedError:  # of pictures and text: transformers' word for the latter is the decoder
        found = [model.get_decoder().get_input_embeddings()]
    if model.config.is_encoder_decoder:
        decoder = model.get_decoder()
        found.append(
            decoder.get_input_embeddings() if hasattr(decoder, "get_input_embeddings") else decoder.embed_tokens
        )
    # MusicGen adds up the embeddings of its codebooks, and the noise of one is the noise of the sum.
    return [each[0] if isinstance(each, nn.ModuleList) else each for each in found]
