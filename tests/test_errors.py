"""Bad input gets an error that names the argument, and nothing is drawn or changed.

One table: what is wrong, the call, the error's type, and what its message must say.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from helpers.devices import CPU_BACKENDS
from neft_kernels import (
    NEFTuneEmbedding,
    add_noise,
    available_backends,
    describe,
    noise_magnitude,
    noisy_embedding,
    replace_embeddings,
    restore_embeddings,
    set_alpha,
)

WEIGHT = torch.arange(20.0).view(5, 4)
IDS = torch.tensor([[0, 1, 2], [3, 4, 0]])
EMBEDS = WEIGHT[IDS]
NAN, INFINITY = float("nan"), float("inf")
NO_EMBEDDING = nn.Linear(2, 2)


def look_up(ids=IDS, weight=WEIGHT, magnitude=0.1, **options):
    return lambda: noisy_embedding(ids, weight, magnitude, **options)


def add(embeds=EMBEDS, magnitude=0.1, **options):
    return lambda: add_noise(embeds, magnitude, **options)


def magnitude_of(ids=IDS, embedding_dim=4, alpha=5.0, **options):
    return lambda: noise_magnitude(ids, embedding_dim, alpha, **options)


BAD = {
    "id too large": (look_up(torch.tensor([[1, 2], [3, 5]])), IndexError, r"input_ids\[1, 1\] is 5.*\[0, 5\)"),
    "id negative": (look_up(torch.tensor([0, -1])), IndexError, r"input_ids\[1\] is -1"),
    "id too large, int32": (look_up(torch.tensor([9], dtype=torch.int32)), IndexError, r"input_ids\[0\] is 9"),
    "id too large, 0-D": (look_up(torch.tensor(7)), IndexError, r"input_ids\[\] is 7"),
    "id too large, strided": (look_up(torch.tensor([[0, 9], [1, 8]])[:, 1]), IndexError, r"input_ids\[0\] is 9"),
    "id into an empty table": (look_up(torch.tensor([0]), torch.empty(0, 4)), IndexError, r"input_ids\[0\] is 0"),
    "ids are floats": (look_up(IDS.float()), TypeError, "input_ids.*float32"),
    "ids are booleans": (look_up(IDS.bool()), TypeError, "input_ids.*bool"),
    "ids are a list": (look_up([1, 2]), TypeError, "input_ids.*list"),
    "weight is integer": (look_up(weight=WEIGHT.int()), TypeError, "weight.*int32"),
    "weight is complex": (look_up(weight=WEIGHT.to(torch.complex64)), TypeError, "weight.*complex64"),
    "weight is 1-D": (look_up(weight=WEIGHT[0]), ValueError, r"weight.*2 dimensions.*\[4\]"),
    "weight is 3-D": (look_up(weight=EMBEDS), ValueError, r"weight.*2 dimensions"),
    "weight is None": (look_up(weight=None), TypeError, "weight.*NoneType"),
    "weight elsewhere": (look_up(weight=WEIGHT.to("meta")), ValueError, "input_ids is on cpu, but weight is on meta"),
    "no such noise": (
        look_up(noise="normal"),
        ValueError,
        "noise must be one of uniform, sign, gaussian, not 'normal'",
    ),
    "no such noise on embeddings": (add(noise=1), ValueError, "noise must be one of uniform, sign, gaussian, not 1"),
    "symmetric a string": (look_up(symmetric="yes"), TypeError, "symmetric must be True or False, not str"),
    "symmetric a number on embeddings": (add(symmetric=1), TypeError, "symmetric must be True or False, not int"),
    "an odd number of tokens in two halves": (
        look_up(IDS[:1], symmetric=True),
        ValueError,
        r"symmetric=True.*input_ids has 3 tokens.*torch\.cat",
    ),
    "magnitude negative": (look_up(magnitude=-0.1), ValueError, "magnitude.*-0.1"),
    "magnitude NaN": (look_up(magnitude=NAN), ValueError, "magnitude.*nan"),
    "magnitude infinite": (look_up(magnitude=INFINITY), ValueError, "magnitude.*inf"),
    "magnitude a string": (look_up(magnitude="5"), TypeError, "magnitude.*str"),
    "magnitude fp64": (look_up(magnitude=torch.ones(2, 3).double()), TypeError, "magnitude.*float64"),
    "magnitude requires a gradient": (
        look_up(magnitude=torch.ones(3, requires_grad=True)),
        ValueError,
        "magnitude requires a gradient",
    ),
    "magnitude too short": (look_up(magnitude=torch.ones(2)), ValueError, r"magnitude of shape \[2\].*\[2, 3\]"),
    "magnitude too deep": (look_up(magnitude=torch.ones(1, 2, 3)), ValueError, r"magnitude of shape \[1, 2, 3\]"),
    "magnitude elsewhere": (look_up(magnitude=torch.ones(3, device="meta")), ValueError, "magnitude is on meta"),
    "a token's magnitude negative": (look_up(magnitude=torch.tensor([1.0, 2.0, -3.0])), ValueError, "magnitude.*-3"),
    "a token's magnitude NaN": (look_up(magnitude=torch.tensor([1.0, NAN, 3.0])), ValueError, "magnitude.*nan"),
    "a token's magnitude infinite": (
        look_up(magnitude=torch.tensor([1.0, 2.0, INFINITY])),
        ValueError,
        "magnitude.*inf",
    ),
    "seed of two": (look_up(seed=torch.tensor([1, 2])), ValueError, r"seed.*\[2\]"),
    "seed of fp32": (look_up(seed=torch.tensor([1.0])), ValueError, "seed.*float32"),
    "seed elsewhere": (look_up(seed=torch.zeros(1, dtype=torch.int64, device="meta")), ValueError, "seed is on meta"),
    "seed too large": (look_up(seed=2**63), ValueError, "seed.*64 bits"),
    "seed too small": (look_up(seed=-(2**63) - 1), ValueError, "seed.*64 bits"),
    "seed a string": (look_up(seed="0"), TypeError, "seed.*str"),
    "seed a boolean": (look_up(seed=True), TypeError, "seed.*bool"),
    "stream negative": (look_up(stream=-1), ValueError, "stream.*-1"),
    "stream too large": (look_up(stream=2**32), ValueError, "stream"),
    "first_token negative": (look_up(first_token=-1), ValueError, "first_token.*-1"),
    "first_token too large": (look_up(first_token=2**63), ValueError, "first_token.*9223372036854775808"),
    "padding_idx too large": (look_up(padding_idx=5), ValueError, "padding_idx.*5"),
    "padding_idx too small": (look_up(padding_idx=-6), ValueError, "padding_idx.*-6"),
    "no such backend": (look_up(backend="tpu"), ValueError, "backend.*tpu"),
    "backend not here": (look_up(backend="cuda"), RuntimeError, "backend='cuda'"),
    "embeds are integers": (add(IDS), TypeError, "embeds.*int64"),
    "embeds are 0-D": (add(torch.tensor(1.0)), ValueError, "embeds"),
    "add_noise: magnitude NaN": (add(magnitude=torch.full((3,), NAN)), ValueError, "magnitude.*nan"),
    "add_noise: magnitude negative": (add(magnitude=-1), ValueError, "magnitude.*-1"),
    "add_noise: stream": (add(stream=2**32), ValueError, "stream"),
    "add_noise: first_token": (add(first_token=-1), ValueError, "first_token.*-1"),
    "add_noise: seed": (add(seed=torch.tensor([1, 2])), ValueError, r"seed.*\[2\]"),
    "add_noise: backend not here": (add(backend="cuda"), RuntimeError, "backend='cuda'"),
    "alpha negative": (magnitude_of(alpha=-5), ValueError, "alpha.*-5"),
    "alpha NaN": (magnitude_of(alpha=NAN), ValueError, "alpha.*nan"),
    "alpha infinite": (magnitude_of(alpha=INFINITY), ValueError, "alpha.*inf"),
    "alpha a boolean": (magnitude_of(alpha=True), TypeError, "alpha.*bool"),
    "alpha a string": (magnitude_of(alpha="5"), TypeError, "alpha.*str"),
    "embedding_dim 0": (magnitude_of(embedding_dim=0), ValueError, "embedding_dim.*0"),
    "scale_by unknown": (magnitude_of(scale_by="token"), ValueError, "scale_by.*token"),
    "noise_on unknown": (magnitude_of(noise_on="answer", labels=IDS), ValueError, "noise_on.*answer"),
    "mask of another shape": (magnitude_of(attention_mask=torch.ones(2, 4)), ValueError, r"attention_mask.*\[2, 4\]"),
    "mask elsewhere": (
        magnitude_of(attention_mask=IDS.to("meta")),
        ValueError,
        "attention_mask is on meta.*cpu; move it",
    ),
    "positions elsewhere": (magnitude_of(position_ids=IDS.to("meta")), ValueError, "position_ids is on meta.*cpu"),
    "labels elsewhere": (
        magnitude_of(labels=IDS.to("meta"), noise_on="prompt"),
        ValueError,
        "labels is on meta.*cpu",
    ),
    "positions of another length": (magnitude_of(position_ids=torch.arange(4)), ValueError, r"position_ids.*\[4\]"),
    "positions of one column": (magnitude_of(position_ids=torch.zeros(2, 1)), ValueError, r"position_ids.*\[2, 1\]"),
    "positions that do not broadcast": (magnitude_of(position_ids=torch.zeros(3, 3)), ValueError, "position_ids"),
    "cu_seq_lens for two rows": (magnitude_of(cu_seq_lens=torch.tensor([0, 3])), ValueError, "cu_seq_lens.*one row"),
    "cu_seq_lens too short": (magnitude_of(IDS[:1], cu_seq_lens=torch.tensor([0])), ValueError, "cu_seq_lens.*N"),
    "cu_seq_lens too long": (
        magnitude_of(IDS[:1], cu_seq_lens=torch.arange(5)),
        ValueError,
        "cu_seq_lens.*4 sequences",
    ),
    "cu_seq_lens of two rows": (
        magnitude_of(IDS[:1], cu_seq_lens=torch.ones(2, 2)),
        ValueError,
        r"cu_seq_lens.*\[2, 2\]",
    ),
    "module: alpha": (lambda: NEFTuneEmbedding(5, 4, alpha=-1), ValueError, "alpha"),
    "module: scale_by": (lambda: NEFTuneEmbedding(5, 4, scale_by="x"), ValueError, "scale_by"),
    "module: stream": (lambda: NEFTuneEmbedding(5, 4, stream=-1), ValueError, "stream"),
    "module: stream too large": (lambda: NEFTuneEmbedding(5, 4, stream=2**32), ValueError, "stream.*4294967296"),
    "module: stream is a float": (lambda: NEFTuneEmbedding(5, 4, stream=1.5), TypeError, "stream.*float"),
    "module: stream is a boolean": (lambda: NEFTuneEmbedding(5, 4, stream=True), TypeError, "stream.*bool"),
    "module: layout without group": (
        lambda: NEFTuneEmbedding(5, 4, sequence_layout="head_tail"),
        ValueError,
        "sequence_layout='head_tail' needs a sequence_group",
    ),
    "magnitude of a list": (magnitude_of([1, 2]), TypeError, "input_ids.*list"),
    "magnitude of a width in words": (magnitude_of(embedding_dim="8"), TypeError, "embedding_dim.*str"),
    "describe: no module": (lambda: describe(None), TypeError, "model.*NoneType"),
    "restore: no module": (lambda: restore_embeddings(None), TypeError, "model.*NoneType"),
    "set_alpha: no module": (lambda: set_alpha(None, 5.0), TypeError, "model.*NoneType"),
    "module: backend": (lambda: NEFTuneEmbedding(5, 4, backend="x"), ValueError, "backend"),
    "module: max_norm": (lambda: NEFTuneEmbedding(5, 4, max_norm=1.0), ValueError, "max_norm"),
    "model is no module": (lambda: replace_embeddings("gpt2"), TypeError, "model.*str"),
    "model without embeddings": (lambda: replace_embeddings(NO_EMBEDDING), ValueError, "model.*0 nn.Embedding"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    state = torch.get_rng_state()
    weight = WEIGHT.clone()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(WEIGHT, weight)
    if "id " not in case and "token's" not in case and "add_noise: magnitude NaN" not in case:
        # Values inside tensors are looked at by the kernel, after the seed is drawn; all else is refused before.
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_backend_checks_values_on_the_cpu(backend):
    with pytest.raises(IndexError, match=r"input_ids\[0, 1\] is 5"):
        noisy_embedding(torch.tensor([[0, 5]]), WEIGHT, 0.1, backend=backend)
    with pytest.raises(IndexError, match=r"input_ids\[0, 1\] is -1"):
        noisy_embedding(torch.tensor([[0, -1]]), WEIGHT, 0.1, backend=backend)
    with pytest.raises(ValueError, match="magnitude"):
        noisy_embedding(IDS, WEIGHT, torch.tensor([1.0, NAN, 3.0]), backend=backend)
    with pytest.raises(ValueError, match="magnitude"):
        add_noise(EMBEDS, torch.tensor([1.0, -1.0, 3.0]), backend=backend)


@pytest.mark.cpu_extension
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_default_dtype_plays_no_part(dtype):
    torch.set_default_dtype(dtype)
    try:
        for backend in ("cpu", "reference"):
            assert noisy_embedding(IDS, WEIGHT, 1e5, backend=backend).dtype == torch.float32
            with pytest.raises(ValueError, match="magnitude"):
                noisy_embedding(IDS, WEIGHT, 1e39, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_compiled_call_raises_the_same_error():
    compiled = torch.compile(lambda ids: noisy_embedding(ids, WEIGHT, 0.1), fullgraph=True, backend="aot_eager")
    compiled(IDS)
    with pytest.raises(IndexError, match="is 9"):
        compiled(torch.full((2, 3), 9))


def test_a_backend_that_cannot_run_says_why():
    missing = [backend for backend in available_backends() if "cpu" not in backend.devices]
    assert missing
    for backend in missing:
        with pytest.raises(RuntimeError, match=f"backend='{backend.name}'.*{backend.detail[:10]}"):
            noisy_embedding(IDS, WEIGHT, 0.1, backend=backend.name)


@pytest.mark.parametrize(
    ("switch", "value", "message"),
    [
        ("NEFT_KERNELS_BACKEND", "tpu", "tpu"),
        pytest.param(
            *("NEFT_KERNELS_INSTRUCTION_SET", "sse9", "NEFT_KERNELS_INSTRUCTION_SET.*sse9"),
            marks=pytest.mark.cpu_extension,
        ),
    ],
)
def test_a_bad_switch_is_refused(switch, value, message):
    code = "import torch, neft_kernels; neft_kernels.noisy_embedding(torch.tensor([0]), torch.ones(1, 4), 0.1)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, switch: value}, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert re.search(message, run.stderr)
