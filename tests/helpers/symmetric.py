"""A training step on a batch that is doubled by hand, with the noise and with its negative, and what a model sees of it."""

import torch
from torch import nn
from torch.nn import functional as F

from helpers.models import D
from neft_kernels import add_noise, noise_magnitude

SEED = 7


def twice(tensor):
    return torch.cat((tensor, tensor))


def by_hand(model, inputs, magnitude, noise="uniform"):
    """Loss, logits and gradients of the plain `model` on the doubled batch. `magnitude` is that of `inputs`, ``[B, L]``."""
    torch.manual_seed(SEED)
    plain = model.get_input_embeddings()(twice(inputs["input_ids"]))
    noisy = add_noise(plain, twice(magnitude), noise=noise, symmetric=True)
    rest = {name: twice(value) for name, value in inputs.items() if name != "input_ids"}
    output = model(inputs_embeds=noisy, **rest, use_cache=False)
    return output.loss, output.logits, gradients(model, output.loss)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def trained(model, inputs):
    torch.manual_seed(SEED)
    output = model(**inputs, use_cache=False)
    return output.loss, output.logits, gradients(model, output.loss)


def magnitude_of(inputs, alpha=5.0, **options):
    per_token = noise_magnitude(inputs["input_ids"], D, alpha, **options)
    return torch.as_tensor(per_token, dtype=torch.float32).expand(inputs["input_ids"].shape)


def assert_equal(found, expected):
    for this, that in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(this, that)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in found[2].items():
        # The rows of a repeated id are summed in float64 by our kernel, and in float32 by PyTorch's.
        is_table = "embed_tokens" in name
        torch.testing.assert_close(
            gradient, expected[2][name], rtol=1e-5 if is_table else 0, atol=1e-7 if is_table else 0
        )


def with_first_half(expected, rows):
    loss, logits, found = expected
    return loss, logits[:rows], found


def noise_seen(model, inputs):
    """The noise in what the embeddings return, ``[2 B, L, D]``, each look-up, after a pass in training."""
    seen = []

    def see(module, args, output):
        with torch.no_grad():
            seen.append((output - F.embedding(args[0], module.weight) * scale, args[0]))

    scale = getattr(model.get_input_embeddings(), "embed_scale", 1.0)
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and each.num_embeddings == 50]
    handles = [each.register_forward_hook(see) for each in tables]
    torch.manual_seed(SEED)
    output = model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen, output


# --- when the batch is not doubled -----------------------------------------------------------------------------------


def rows_seen(model, **inputs):
    rows = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    return rows, output
