"""Contract: the first noisy batch is logged once, with what the noise is."""

import logging

import pytest
import torch

from helpers.models import D, llama
from neft_kernels import replace_embeddings
from neft_kernels.models.noise import EmbeddingNoise


@pytest.mark.cpu_extension
def test_the_first_noisy_batch_is_logged_once(caplog):
    network = replace_embeddings(llama(), alpha=5.0)
    with caplog.at_level(logging.INFO, logger="neft_kernels"):
        for _ in range(2):
            network(torch.arange(3, 12)[None], attention_mask=torch.ones(1, 9))
    (record,) = [record.message for record in caplog.records if "noise is on" in record.message]
    assert record.startswith("model.embed_tokens: noise is on, alpha=5 scaled by sequence, backend cpu")
    assert f"{5.0 / (9 * D) ** 0.5:.3g}" in record


def test_the_log_of_a_schedule_and_of_what_could_not_be_used(caplog):
    network = replace_embeddings(llama(), alpha=lambda step: 3.0 + step)
    with caplog.at_level(logging.INFO, logger="neft_kernels"):
        network(torch.arange(3, 12)[None], attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    (message,) = [record.getMessage() for record in caplog.records if "noise is on" in record.getMessage()]
    assert "alpha=3 scaled" in message
    assert message.endswith("(attention_mask of shape [1, 1, 9, 9] does not tell the lengths of ids of shape [1, 9])")


def test_magnitudes_are_read_only_for_a_log_that_is_kept(caplog, monkeypatch):
    """On a GPU reading them waits for the device."""
    read = []
    monkeypatch.setattr(EmbeddingNoise, "bounds", lambda noise: read.append(noise))
    for level, reads in ((logging.WARNING, 0), (logging.INFO, 1)):
        with caplog.at_level(level, logger="neft_kernels"):
            replace_embeddings(llama(), alpha=5.0)(torch.arange(3, 12)[None])
        assert len(read) == reads
