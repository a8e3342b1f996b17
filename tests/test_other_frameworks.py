"""Contract: the package serves models and training loops that are not of Hugging Face.

The decoder has the argument names of torchtune's TransformerDecoder, whose package does not import with current torchao. The
Trainer and the LightningModule are those of Lightning.
"""

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from neft_kernels import NEFTuneEmbedding, describe, noise_magnitude, noisy_embedding, replace_embeddings
from neft_kernels.models.options import NoiseOptions

V, D = 50, 16
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 0, 0, 0]])
MASK = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
OWN_NAMES = {"input_ids": "tokens", "attention_mask": "mask", "position_ids": "input_pos"}


class Decoder(nn.Module):
    """The embedding and the output layer of a decoder with argument names of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(V, D)
        self.output = nn.Linear(D, V)

    def forward(self, tokens, *, mask=None, input_pos=None):
        self.embeds = self.tok_embeddings(tokens)
        return self.output(self.embeds)


class OfTwoParts(nn.Module):
    """A model around a decoder; it is given a batch as a dictionary, and passes on tensors."""

    def __init__(self):
        super().__init__()
        self.decoder = Decoder()

    def forward(self, batch):
        return self.decoder(batch["tokens"], mask=batch["mask"])


def noisy(model=None, names=OWN_NAMES, **options):
    return replace_embeddings(model or Decoder(), argument_names=names, **options).train()


def expected(model, seed, **sequences):
    """What the embedding must return after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    weight = model.tok_embeddings.weight
    return noisy_embedding(IDS, weight, noise_magnitude(IDS, D, 5.0, **sequences))


def test_the_models_own_names_tell_the_lengths():
    model = noisy()
    torch.manual_seed(1)
    model(IDS, mask=MASK)
    assert torch.equal(model.embeds, expected(model, 1, attention_mask=MASK))
    assert torch.equal(model.embeds[1, 3:], model.tok_embeddings.weight[IDS[1, 3:]])
    assert describe(model)[0].note == ""


def test_positions_tell_packed_sequences_beside_a_mask_of_three_dimensions():
    """As torchtune packs: a mask ``[B, L, L]`` of blocks, and positions that begin anew."""
    model, positions = noisy(), torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]])
    blocks = torch.ones(2, 6, 6, dtype=torch.bool)
    torch.manual_seed(2)
    model(IDS, mask=blocks, input_pos=positions)
    assert torch.equal(model.embeds, expected(model, 2, position_ids=positions))


def test_without_the_names_the_padded_length_is_used_and_describe_says_so():
    model = noisy(names=None)
    torch.manual_seed(1)
    model(IDS, mask=MASK)
    assert torch.equal(model.embeds, expected(model, 1))
    assert "no mask or positions were given" in describe(model)[0].note


def test_a_batch_in_a_dictionary_has_the_names_too():
    model = noisy(OfTwoParts())
    torch.manual_seed(1)
    model({"tokens": IDS, "mask": MASK})
    assert torch.equal(model.decoder.embeds, expected(model.decoder, 1, attention_mask=MASK))


def test_labels_and_boundaries_have_names_too():
    class Packed(Decoder):
        def forward(self, tokens, targets, boundaries):
            return super().forward(tokens)

    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
    targets = torch.tensor([[-100, 5, -100, -100, 7, 8]])
    names = {"cu_seq_lens": "boundaries", "labels": "targets", "input_ids": "tokens"}
    model = noisy(Packed(), names, noise_on="completion")
    model(IDS[:1], targets, boundaries)
    noise = (model.embeds - model.tok_embeddings.weight[IDS[:1]]).abs().amax(-1)
    assert torch.equal(noise > 0, targets != -100)
    magnitude = noise_magnitude(IDS[:1], D, 5.0, cu_seq_lens=boundaries)
    assert (noise <= magnitude * (1 + 1e-6)).all()
    assert describe(model)[0].last_magnitude == (magnitude.min().item(), magnitude.max().item())


def test_the_names_survive_torch_compile():
    model = noisy()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(IDS, mask=MASK)
    changed = (model.embeds != model.tok_embeddings.weight[IDS]).any(-1)
    assert torch.equal(changed, MASK)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"attention_mask": "msk"}, ValueError, "names 'msk', which no forward of the model takes; they take tokens, mask"),
        ({"mask": "attention_mask"}, ValueError, "a key of argument_names must be one of input_ids, attention_mask"),
        ({"attention_mask": 3}, TypeError, r"argument_names\['attention_mask'\] must be a str, not int"),
        (["mask"], TypeError, "argument_names must be a dict, not list"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_are_refused(names, error, message):
    model = Decoder()
    with pytest.raises(error, match=message):
        replace_embeddings(model, argument_names={"input_ids": "tokens", **names} if type(names) is dict else names)
    assert type(model.tok_embeddings) is nn.Embedding


def test_an_embedding_that_is_built_noisy_has_its_own_names():
    with pytest.raises(TypeError, match="argument_names"):
        NEFTuneEmbedding(V, D, argument_names=OWN_NAMES)


def test_a_decoder_that_calls_the_op_itself():
    """Without any hook: the model computes the magnitude of its batch, and draws in training alone."""

    class WithOp(Decoder):
        def forward(self, tokens, *, mask=None):
            weight = self.tok_embeddings.weight
            if not self.training:
                return self.output(nn.functional.embedding(tokens, weight))
            magnitude = noise_magnitude(tokens, D, 5.0, attention_mask=mask)
            return self.output(noisy_embedding(tokens, weight, magnitude))

    by_op, by_hook = WithOp().train(), noisy()
    torch.manual_seed(3)
    logits = by_op(IDS, mask=MASK)
    torch.manual_seed(3)
    assert torch.equal(logits, by_hook(IDS, mask=MASK))
    assert torch.equal(by_op.eval()(IDS, mask=MASK), by_hook.eval()(IDS, mask=MASK))


class Lit(lightning.LightningModule):
    """Trains :class:`Decoder` to return its own input; records the noise of each pass."""

    def __init__(self):
        super().__init__()
        self.model, self.noise = Decoder(), {"training": [], "validation": []}

    def step(self, batch, stage):
        logits = self.model(batch["tokens"], mask=batch["mask"])
        embeds = self.model.embeds.detach()
        self.noise[stage].append((embeds != self.model.tok_embeddings.weight[batch["tokens"]]).any(-1))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten())

    def training_step(self, batch, _):
        return self.step(batch, "training")

    def validation_step(self, batch, _):
        return self.step(batch, "validation")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_trains_with_the_noise_and_validates_without(tmp_path):
    rows = [{"tokens": ids, "mask": mask} for ids, mask in zip(IDS, MASK, strict=True)]
    lit = Lit()
    replace_embeddings(lit.model, argument_names=OWN_NAMES)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, num_sanity_val_steps=1, **quiet
    )
    trainer.fit(lit, DataLoader(rows, batch_size=2), DataLoader(rows, batch_size=2))
    assert len(lit.noise["training"]) == 2
    assert all(torch.equal(noise, MASK) for noise in lit.noise["training"])
    assert len(lit.noise["validation"]) == 3
    assert not any(noise.any() for noise in lit.noise["validation"])


def test_options_with_names_can_be_hashed():
    options = NoiseOptions(argument_names=OWN_NAMES)
    assert hash(options) == hash(NoiseOptions())
    assert options != NoiseOptions()


@pytest.mark.parametrize("wrong", ["attention_mask", "position_ids"])
def test_a_name_that_no_forward_takes_is_an_error(wrong):
    with pytest.raises(ValueError, match="'maks', which no forward of the model takes"):
        replace_embeddings(Decoder(), argument_names={wrong: "maks"})
