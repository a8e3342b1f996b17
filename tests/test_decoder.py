"""Contract: the lengths of a decoder's sequences come from its mask, else from its labels, never from those of the encoder."""

import pytest
import torch
import transformers
from torch import nn

from helpers.models import build, llama
from helpers.situations import ALPHA, IDS, MASK, WIDTH, Looks, bound, bounds, notes
from neft_kernels import describe, replace_embeddings

LABELS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 1], [5, 6, 1, -100, -100, -100, -100, -100]])


def of_decoder(model):
    """Of the decoder's last batch. Before transformers 5 T5 has one module for both sides, which the decoder calls last."""
    by_name = {report.name: report.last_magnitude for report in describe(model)}
    return by_name["shared"] if "shared" in by_name else by_name["decoder.embed_tokens"]


def test_a_decoder_without_a_mask_is_as_long_as_its_labels():
    model = replace_embeddings(build("t5, shared table"), ALPHA)
    model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    by_name = {report.name: report for report in describe(model)}
    if "shared" not in by_name:  # which is never called, except before transformers 5, where it is the only one
        assert by_name["encoder.embed_tokens"].last_magnitude == pytest.approx((bound(6), bound(3)))
    assert of_decoder(model) == pytest.approx((bound(8), bound(3)))
    assert not any(notes(model))


@pytest.mark.parametrize(
    ("labels", "lengths"),
    [
        ([[5, -100, 7, 1], [5, 1, -100, -100]], (4, 2)),  # ignored in between: a later one counts
        ([[-100, -100, 7, 1], [-100] * 4], (4, 4)),  # a row of nothing but padding has no noise at all
    ],
)
def test_a_token_of_the_decoder_counts_if_its_label_or_a_later_one_does(labels, lengths):
    model = replace_embeddings(build("t5, shared table"), ALPHA)
    model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor(labels))
    assert of_decoder(model) == pytest.approx(tuple(map(bound, lengths)))


def test_a_mask_of_the_decoder_comes_before_its_labels():
    model = replace_embeddings(build("t5, shared table"), ALPHA)
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    model(input_ids=IDS, attention_mask=MASK, labels=LABELS, decoder_attention_mask=mask)
    assert of_decoder(model) == pytest.approx((bound(8), bound(5)))


def test_labels_that_are_not_asked_about_are_not_noted():
    model = replace_embeddings(llama(), ALPHA)
    model(input_ids=IDS, attention_mask=MASK, labels=IDS)
    assert notes(model) == [""]
    with torch.no_grad():
        assert notes(model) == [""]


def test_a_mask_of_the_decoder_may_have_another_name_inside():
    """As FSMT's decoder has it."""
    config = transformers.FSMTConfig(
        langs=["a", "b"],
        src_vocab_size=60,
        tgt_vocab_size=60,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
    )
    model = replace_embeddings(transformers.FSMTForConditionalGeneration(config).train(), ALPHA)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    decoder = {"decoder_input_ids": IDS[:, :4] + 1, "decoder_attention_mask": mask}
    model(input_ids=IDS, attention_mask=MASK, use_cache=False, **decoder)
    by_name = {report.name: report.last_magnitude for report in describe(model)}
    assert by_name["model.encoder.embed_tokens"] == pytest.approx((bound(6), bound(3)))
    assert by_name["model.decoder.embed_tokens"] == pytest.approx((bound(4), bound(2)))


class ReadsAPicture(nn.Module):
    """A text encoder that reads image states; the labels are an answer, not about its ids."""

    class Text(Looks):
        def forward(self, input_ids, attention_mask=None, encoder_hidden_states=None):
            return self.embedding(input_ids)

    def __init__(self):
        super().__init__()
        self.text = self.Text()

    def get_input_embeddings(self):
        return self.text.embedding

    def forward(self, input_ids, image, labels=None):
        return self.text(input_ids, encoder_hidden_states=image)


def test_labels_of_an_answer_are_not_about_the_question():
    model = replace_embeddings(ReadsAPicture(), ALPHA).train()
    labels = torch.tensor([[5, 6, -100, -100, -100, -100]] * 2)
    model(IDS, torch.zeros(1), labels)
    assert bounds(model) == pytest.approx((bound(6),) * 2)
