"""Contract: masks are those of the ids that a model was given, however it lays these out before it looks them up."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import pad

from neft_kernels import describe, noise_magnitude, replace_embeddings
from neft_kernels.models.rearrangement import is_rearranged, rearrange
from neft_kernels.models.replace import noisy_modules

WIDTH, ALPHA = 16, 5.0
GIVEN = torch.tensor([[3, 4, 5, 0, 0], [6, 7, 8, 9, 10]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
SQUARE = torch.tensor([[3, 4, 0], [5, 0, 0], [6, 7, 8]])
ADDED = torch.full((2, 3), 40)


def magnitudes(given, mask):
    return noise_magnitude(given, WIDTH, ALPHA, attention_mask=mask)


class Look(nn.Module):
    """Looks up ids that it makes of those it is given."""

    def __init__(self, make):
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.make = make

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None):
        return self.embedding(self.make(input_ids))


def bounds(model, make, *args):
    """The magnitude of each token that the last pass looked up, and the noise's largest share of it."""
    replace_embeddings(model, alpha=ALPHA)
    noisy = model(*args)
    magnitude = torch.as_tensor(model.embedding.noise.last_magnitude).expand(noisy.shape[:-1])
    noise = noisy - nn.functional.embedding(make(args[0]), model.embedding.weight)
    assert not noise[magnitude == 0].any()
    # The largest of 16 uniform draws is above a tenth but for a probability of 1e-16; rounding to float32 adds below 1e-5.
    largest = noise[magnitude > 0].abs().amax(-1)
    assert (largest <= magnitude[magnitude > 0] + 1e-5).all()
    assert (largest >= 0.1 * magnitude[magnitude > 0]).all()
    return magnitude


PAD_AFTER, PAD_BEFORE = (lambda m: pad(m, (0, 3))), (lambda m: pad(m, (3, 0)))
LAYOUTS = {
    "as given": (GIVEN, MASK, lambda ids: ids, lambda m: m),
    "a copy with another id, as for pictures": (GIVEN, MASK, lambda ids: ids.masked_fill(ids == 4, 0), lambda m: m),
    "by time": (GIVEN, MASK, lambda ids: ids.mT.contiguous(), lambda m: m.mT),
    "padded on": (GIVEN, MASK, lambda ids: torch.cat((ids, ADDED), 1), PAD_AFTER),
    "behind a prompt, in another integer type": (GIVEN, MASK, lambda ids: torch.cat((ADDED, ids), 1).int(), PAD_BEFORE),
    "square": (SQUARE, SQUARE != 0, lambda ids: ids.clone(), lambda m: m),
    "square, by time": (SQUARE, SQUARE != 0, lambda ids: ids.mT.contiguous(), lambda m: m.mT),
    "square, padded on": (SQUARE, SQUARE != 0, lambda ids: torch.cat((ids, ADDED.mT), 1), lambda m: pad(m, (0, 2))),
    "square, behind a prompt": (
        SQUARE,
        SQUARE != 0,
        lambda ids: torch.cat((ADDED.mT, ids), 1),
        lambda m: pad(m, (2, 0)),
    ),
    "square and the same by time": (
        SQUARE[:1].expand(3, 3) * 0 + 7,
        SQUARE != 0,
        lambda ids: ids.mT.clone(),
        lambda m: m,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_follow_the_ids(layout):
    given, mask, make, laid_out = LAYOUTS[layout]
    want = laid_out(magnitudes(given, mask))
    assert torch.equal(bounds(Look(make), make, given, mask), want)


@pytest.mark.parametrize("layout", ["by time", "padded on", "behind a prompt, in another integer type"])
def test_without_a_mask_the_length_is_that_of_the_ids_given(layout):
    given, _, make, laid_out = LAYOUTS[layout]
    want = laid_out(magnitudes(given, torch.ones_like(given)))
    assert torch.allclose(
        bounds(Look(make), make, given), want, rtol=1e-7
    )  # a number was rounded to float32 in between


def test_ids_that_are_not_found_among_those_looked_up_get_the_batch_rule():
    model = Look(lambda ids: torch.cat((ids[:, :2], ADDED, ids[:, 2:]), 1))
    want = torch.full((2, 8), ALPHA / (8 * WIDTH) ** 0.5)
    assert torch.allclose(bounds(model, model.make, GIVEN, MASK), want, rtol=1e-7)
    (report,) = describe(model)
    assert report.note == "ids of shape [2, 5] were looked up as [2, 8]"


def test_all_that_cannot_be_used_is_noted():
    model = replace_embeddings(Look(lambda ids: torch.cat((ids, ADDED), 1)), alpha=ALPHA)
    model(GIVEN, torch.ones(2, 1, 5, 5))
    (report,) = describe(model)
    assert report.note == (
        "attention_mask of shape [2, 1, 5, 5] does not tell the lengths of ids of shape [2, 5]; "
        "ids of shape [2, 5] were looked up as [2, 8]"
    )


class Labelled(Look):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return super().forward(input_ids)


@pytest.mark.parametrize("noise_on", ["prompt", "completion"])
def test_labels_follow_the_ids_or_choose_none(noise_on):
    """Where the ids are not found among those looked up, none is known to be of the prompt, nor of the completion."""
    labels = GIVEN.masked_fill(GIVEN < 5, -100)
    chosen = (labels == -100) == (noise_on == "prompt")
    inserted = Labelled(lambda ids: torch.cat((ids[:, :2], ADDED, ids[:, 2:]), 1))
    padded = Labelled(lambda ids: torch.cat((ids, ADDED), 1))
    for model, noisy in ((padded, PAD_AFTER(chosen)), (inserted, torch.zeros(2, 8, dtype=torch.bool))):
        replace_embeddings(model, alpha=ALPHA, noise_on=noise_on)
        plain = nn.functional.embedding(model.make(GIVEN), model.embedding.weight)
        assert torch.equal((model(GIVEN, labels=labels) != plain).any(-1), noisy)


class KeepsItsForward(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class LooksUpByName(Look):
    def __init__(self):
        super().__init__(lambda ids: ids.mT.contiguous())
        self.embedding = KeepsItsForward(50, WIDTH)

    def forward(self, input_ids, attention_mask=None):
        return self.embedding(ids=self.make(input_ids))


def test_ids_that_are_given_by_name_are_told_apart_too():
    model = replace_embeddings(LooksUpByName(), alpha=ALPHA)
    model(GIVEN, MASK)
    ((_, _, noise),) = noisy_modules(model)
    assert torch.equal(noise.last_magnitude, magnitudes(GIVEN, MASK).mT)


def test_what_is_of_no_such_layout():
    assert not is_rearranged(GIVEN, GIVEN)
    assert not is_rearranged(SQUARE, SQUARE)
    assert not is_rearranged(GIVEN, GIVEN[:, :3])
    assert not is_rearranged(GIVEN, GIVEN[:1])
    assert not is_rearranged(GIVEN, GIVEN[:1].expand(3, 5))
    assert not is_rearranged(GIVEN, GIVEN[:1].repeat(3, 2))
    assert not is_rearranged(GIVEN, GIVEN[:, 0])
    assert not is_rearranged(GIVEN, torch.zeros(2, 7, 3))
    assert not is_rearranged(GIVEN[0], GIVEN)
    assert not is_rearranged(GIVEN, GIVEN[None])
    assert not is_rearranged(GIVEN[None], GIVEN.mT)
    assert not is_rearranged(GIVEN, GIVEN.to("meta").mT)


def test_a_number_holds_for_the_ids_that_it_is_about():
    assert torch.equal(rearrange(0.5, GIVEN, GIVEN.mT.clone(), 9.0), torch.full(GIVEN.mT.shape, 0.5))
    for number in (0.5, torch.tensor(0.5)):
        assert rearrange(number, SQUARE, SQUARE.clone(), 9.0) == 0.5


def test_ids_that_only_have_the_shape_of_those_given_are_not_taken_for_them():
    assert torch.equal(rearrange(0.5, GIVEN, GIVEN.mT + 1, 9.0), torch.full(GIVEN.mT.shape, 9.0))


class Swallows(Look):
    """Takes a mask and does not pass it on to what looks the ids up, as RWKV does."""

    def __init__(self):
        super().__init__(lambda ids: ids)
        self.inner = Look(self.make)
        self.embedding = self.inner.embedding

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids)


def test_a_mask_that_is_not_passed_on_counts():
    assert torch.equal(bounds(Swallows(), lambda ids: ids, GIVEN, MASK), magnitudes(GIVEN, MASK))


@pytest.mark.parametrize("length", [7, 4])
def test_xlnet_also_with_as_many_sequences_as_tokens(length):
    config = transformers.XLNetConfig(vocab_size=50, d_model=WIDTH, n_layer=1, n_head=2, d_inner=16)
    model = replace_embeddings(transformers.XLNetLMHeadModel(config).train(), alpha=ALPHA)
    ids = torch.randint(3, 50, (4, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 2:] = 0
    model(input_ids=ids, attention_mask=mask)
    (_, _, noise), *rest = noisy_modules(model)
    assert not rest
    assert torch.equal(noise.last_magnitude, magnitudes(ids, mask).mT)


# --- encoders and decoders -------------------------------------------------------------------------------------------


class Half(nn.Module):
    def __init__(self, name):
        super().__init__()
        setattr(self, name, nn.Embedding(50, WIDTH))
        self.name = name

    def forward(self, input_ids, encoder_hidden_states=None, past_key_values=None):
        return getattr(self, self.name)(input_ids)


class Both(nn.Module):
    """An encoder and a decoder with a table each; neither is called with a mask."""

    config = SimpleNamespace(is_encoder_decoder=True)

    def __init__(self, name):
        super().__init__()
        self.encoder, self.decoder = Half("embed_tokens"), Half(name)

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None):
        encoded = self.encoder(input_ids)
        return encoded, self.decoder(decoder_input_ids, encoder_hidden_states=encoded, past_key_values=[encoded])


def test_a_decoder_has_noise_of_its_own_and_not_the_encoders_mask():
    model = replace_embeddings(Both("embed_tokens"), alpha=ALPHA)
    model(GIVEN, MASK, GIVEN.flip(1))
    encoder, decoder = (noise.last_magnitude for _, _, noise in noisy_modules(model))
    assert torch.equal(encoder, magnitudes(GIVEN, MASK))
    assert decoder == ALPHA / (5 * WIDTH) ** 0.5  # although a cache is passed to it: one that the model made itself


def test_a_decoder_whose_embedding_is_not_known_stays_plain_and_describe_says_so(caplog):
    model = replace_embeddings(Both("lookup"), alpha=ALPHA)
    (report,) = describe(model)
    assert report.name == "encoder.embed_tokens"
    assert "the decoder's tokens get no noise" in report.note
    assert "the decoder's tokens get no noise" in caplog.text
    encoded, decoded = model(GIVEN, MASK, GIVEN)
    assert torch.equal(decoded, model.decoder.lookup(GIVEN))
    assert not torch.equal(encoded, nn.functional.embedding(GIVEN, model.encoder.embed_tokens.weight))
    assert "the decoder's tokens get no noise" in describe(model)[0].note


def test_codebooks_get_the_noise_of_their_sum_once():
    config = transformers.MusicgenDecoderConfig(
        vocab_size=50, num_codebooks=4, hidden_size=WIDTH, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = replace_embeddings(transformers.MusicgenForCausalLM(config).train(), alpha=ALPHA)
    (report,) = describe(model)
    assert report.name == "model.decoder.embed_tokens.0"
    tables = model.model.decoder.embed_tokens
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(0))  # of one sequence
    model(input_ids=ids)
    noise = sum(table(row[None]) for table, row in zip(tables, ids, strict=True)) - sum(
        nn.functional.embedding(row[None], table.weight) for table, row in zip(tables, ids, strict=True)
    )
    assert 0.9 * ALPHA / (9 * WIDTH) ** 0.5 < noise.abs().max() <= ALPHA / (9 * WIDTH) ** 0.5 + 1e-5


class Codebooks(nn.Module):
    """Returns the sum of what it looks up in its codebooks, as CSM's and Kyutai's embeddings do."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, WIDTH) for _ in range(3))

    def forward(self, ids):  # [B, L, 3] to [B, L, WIDTH]
        return sum(table(ids[..., number]) for number, table in enumerate(self.tables))


def test_ids_of_several_codebooks_are_as_long_as_what_is_looked_up():
    model = Look(lambda ids: ids[..., None].expand(*ids.shape, 3))
    model.embedding = Codebooks()
    replace_embeddings(model, alpha=ALPHA)
    for args, want in (((GIVEN,), ALPHA / (5 * WIDTH) ** 0.5), ((GIVEN, MASK), magnitudes(GIVEN, MASK))):
        model(*args)
        ((_, _, noise),) = noisy_modules(model)
        assert torch.equal(torch.as_tensor(noise.last_magnitude), torch.as_tensor(want))
