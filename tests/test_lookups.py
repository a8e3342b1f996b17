"""Contract: the modules by which a model looks its tokens up become noisy, and no others; each keeps its own forward."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from helpers.models import names
from neft_kernels import NEFTuneEmbedding, describe, no_noise, replace_embeddings, restore_embeddings


def test_of_pictures_and_text_the_text_is_noisy():
    part = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=part, vision_config=part))
    if not hasattr(clip.text_model, "get_input_embeddings"):  # as in older versions, where it is no model by itself
        with pytest.raises(ValueError, match="found no token embedding in model of class CLIPModel"):
            replace_embeddings(clip)
    else:
        assert names(replace_embeddings(clip)) == ["text_model.embeddings.token_embedding"]


@pytest.mark.parametrize(
    "named",
    [
        nn.Parameter(torch.zeros(10, 4)),
        nn.ModuleList(),
        nn.ModuleList([nn.Embedding(10, 4), nn.Linear(10, 4)]),
        nn.ModuleDict({"text": nn.Embedding(10, 4)}),
        None,
    ],
    ids=lambda named: type(named).__name__,
)
def test_an_input_embedding_that_is_never_called_is_refused(named):
    """A hook on it would add noise to nothing."""
    model = Around(named)
    with pytest.raises(ValueError, match=rf"Around returns a {type(named).__name__}, which is not called"):
        replace_embeddings(model)
    assert names(model) == []


@pytest.mark.parametrize("error", [NotImplementedError("not here"), AttributeError("not here")])
def test_a_model_that_fails_to_name_its_embedding_is_refused_with_the_reason(error):
    class Fails(nn.Module):
        def get_input_embeddings(self):
            raise error

    with pytest.raises(ValueError, match=r"found no token embedding in model of class Fails: .*\(not here\)"):
        replace_embeddings(Fails())


class Tied(nn.Module):
    """Looks tokens up by a module that it does not name, on the table of the one that it does."""

    def __init__(self):
        super().__init__()
        self.named, self.used, self.other = (nn.Embedding(50, 16) for _ in range(3))
        self.used.weight = self.named.weight

    def get_input_embeddings(self):
        return self.named

    def forward(self, input_ids):
        return self.used(input_ids), self.other(input_ids)


def test_whatever_looks_up_the_same_table_is_noisy_and_nothing_else():
    model, ids = replace_embeddings(Tied()), torch.arange(9)[None]
    assert names(model) == ["named", "used"]
    used, other = model(ids)
    assert not torch.equal(used, model.named.weight[ids])
    assert torch.equal(other, model.other.weight[ids])


class Seeing(nn.Module):
    """Of an encoder that reads pictures and a decoder, each of which names what it takes its input by."""

    config = SimpleNamespace(is_encoder_decoder=True)

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Around(nn.Linear(4, 16)), Around(nn.Embedding(50, 16))

    def get_input_embeddings(self):
        return self.decoder.get_input_embeddings()


def test_what_an_encoder_takes_pictures_by_is_left_alone():
    assert names(replace_embeddings(Seeing())) == ["decoder.look_up"]


def test_what_names_no_embedding_is_refused():
    config = transformers.CanineConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="CanineModel"):
        replace_embeddings(transformers.CanineModel(config))


def test_plain_modules_and_modules_built_noisy():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    replace_embeddings(model)
    assert names(model) == ["0"]
    restore_embeddings(model)
    assert type(model[0]) is nn.Embedding

    built = nn.Sequential(NEFTuneEmbedding(10, 4, alpha=2.0))
    assert describe(replace_embeddings(built, alpha=9.0))[0].alpha == 9.0
    assert describe(restore_embeddings(built))[0].alpha == 2.0
    two = nn.ModuleList([nn.Embedding(10, 4), nn.Embedding(10, 4)])
    with pytest.raises(ValueError, match=r"2 nn\.Embedding"):
        replace_embeddings(two)


def test_whatever_is_no_plain_embedding_keeps_its_own_forward():
    renormed = nn.Sequential(nn.Embedding(10, 4, max_norm=0.1))
    assert describe(replace_embeddings(renormed))[0].strategy == "add_noise"
    out = renormed(torch.arange(10)[None])
    assert (renormed[0].weight.norm(dim=1) <= 0.1 + 1e-6).all()
    assert out.norm(dim=-1).max() > 0.1

    class Doubled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    narrow = nn.Sequential(nn.Embedding(10, 4, _weight=torch.randn(10, 4).to(torch.float8_e4m3fn)))
    narrow[0].register_forward_hook(lambda module, args, output: output.float())
    assert describe(replace_embeddings(narrow, alpha=1.0))[0].strategy == "add_noise"
    noise = narrow(torch.arange(10)[None])[0] - narrow[0].weight.float()
    assert 0 < noise.abs().max() <= 1.0 / (10 * 4) ** 0.5 + 1e-6

    on_the_instance = nn.Sequential(nn.Embedding(10, 4))  # as accelerate's offloading has it
    on_the_instance[0].forward = lambda ids: 3 * nn.functional.embedding(ids, on_the_instance[0].weight)
    assert describe(replace_embeddings(on_the_instance, alpha=1e-3))[0].strategy == "add_noise"
    out = on_the_instance(torch.arange(10)[None])
    assert torch.allclose(out[0], 3 * on_the_instance[0].weight, atol=1e-3)
    assert not torch.equal(out[0], 3 * on_the_instance[0].weight)

    doubled = nn.Sequential(Doubled(10, 4))
    assert describe(replace_embeddings(doubled, alpha=1e-3))[0].strategy == "add_noise"
    out = doubled(torch.arange(10)[None])
    assert torch.allclose(out[0], 2 * doubled[0].weight, atol=1e-3)
    assert not torch.equal(out[0], 2 * doubled[0].weight)


class Around(nn.Module):
    """A model of nothing but what looks its tokens up."""

    def __init__(self, look_up):
        super().__init__()
        self.look_up = look_up

    def get_input_embeddings(self):
        return self.look_up

    def forward(self, input_ids, **options):
        return self.look_up(input_ids, **options)


class Returns(nn.Module):
    """Returns more than its rows, as I-BERT's embedding does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10, 4))

    def forward(self, ids, scale=None):
        return self.weight[ids], scale, "more"


def test_noise_is_on_the_first_of_what_an_embedding_returns_and_the_rest_is_as_it_was():
    model, scale, ids = replace_embeddings(Around(Returns()), alpha=5.0), torch.ones(3), torch.arange(10)[None]
    embeds, *rest = model(ids, scale=scale)
    assert 0 < embeds.abs().max() <= 5.0 / (10 * 4) ** 0.5
    assert rest[0] is scale
    assert rest[1:] == ["more"]
    with no_noise(model):
        assert not model(ids)[0].any()


def test_a_single_id_gets_no_noise_from_what_keeps_its_own_forward():
    """transformers looks special tokens up so; it is no sequence."""

    class Doubled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    model = replace_embeddings(Around(Doubled(10, 4)))
    assert torch.equal(model(torch.tensor(3)), 2 * model.look_up.weight[3])
    assert not torch.equal(model(torch.tensor([3])), 2 * model.look_up.weight[[3]])


def test_what_was_given_a_class_of_its_own_after_ours_is_plain_once_restored():
    """As fully_shard() does; the class stays, because it is not ours to take away."""
    model = replace_embeddings(nn.Sequential(nn.Embedding(10, 4)))
    model[0].__class__ = type("Sharded", (NEFTuneEmbedding,), {})
    ids = torch.arange(10)[None]
    assert not torch.equal(model(ids), model[0].weight[ids])
    restore_embeddings(model)
    assert type(model[0]).__name__ == "Sharded"
    assert torch.equal(model(ids), model[0].weight[ids])
    assert describe(model) == ()
    assert describe(replace_embeddings(model, alpha=2.0))[0].alpha == 2.0


class TakesAMask(nn.Module):
    """An embedding whose forward has an argument of the name that a noisy embedding takes."""

    def __init__(self):
        super().__init__()
        self.weight, self.mask = nn.Parameter(torch.zeros(10, 4)), None

    def forward(self, ids, attention_mask=None):
        self.mask = attention_mask
        return self.weight[ids]


def test_an_embedding_that_takes_a_mask_itself_is_given_it():
    model, ids = replace_embeddings(Around(TakesAMask())), torch.arange(10)[None]
    mask = torch.ones_like(ids)
    assert model(ids, attention_mask=mask).any()
    assert model.look_up.mask is mask
