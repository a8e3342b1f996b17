"""Contract: replace_embeddings makes the token look-ups of a real model noisy in training, and changes nothing else."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import generation

from helpers.models import MODELS, batch, build, names
from neft_kernels import (
    NEFTuneEmbedding,
    describe,
    no_noise,
    noise_magnitude,
    replace_embeddings,
    restore_embeddings,
    set_alpha,
)
from neft_kernels.models.batch import EMPTY_BATCH


def expected_in(model, name):
    """Name and strategy of the embeddings that become noisy: before transformers 5, T5 has one module under three names."""
    modules = dict(model.named_modules())
    return {key: strategy for key, strategy in MODELS[name][2].items() if key in modules}


def noise_in(model, inputs):
    """What the noise adds to each noisy embedding's output in one forward pass, by name."""
    outputs = {}

    def record(name):
        def hook(module, args, output):
            outputs[f"{name}, of the decoder" if name in outputs else name] = output.detach().clone()

        return hook

    # Hooks run in their order, so these see the output with its noise.
    modules = {name: model.get_submodule(name) for name in names(model)}
    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    model(**inputs)
    noisy = dict(outputs)
    outputs.clear()
    with no_noise(model):
        model(**inputs)
    for handle in handles:
        handle.remove()
    return {name: noisy[name] - outputs[name] for name in noisy}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_the_right_embeddings_become_noisy(name):
    model = build(name)
    assert replace_embeddings(model, alpha=5.0) is model
    reports = describe(model)
    expected = expected_in(model, name)
    if name.startswith("bart"):  # the table itself may be held in a plain module that forward does not call
        expected = {key: report.strategy for key, report in zip(expected, reports, strict=True)}
        assert set(expected.values()) >= {"add_noise"}
    assert {report.name: report.strategy for report in reports} == expected
    assert {report.state for report in reports} == {"on"}


def test_nothing_else_changes(name):
    model, plain = build(name), build(name)
    inputs = batch()
    parameters = dict(model.named_parameters())
    replace_embeddings(model)
    assert {key: id(value) for key, value in model.named_parameters()} == {k: id(v) for k, v in parameters.items()}
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(isinstance(model.get_submodule(key), type(plain.get_submodule(key))) for key in names(model))
    with no_noise(model):
        assert torch.equal(model(**inputs).loss, plain(**inputs).loss)
    assert not torch.equal(model(**inputs).loss, plain(**inputs).loss)
    model.eval(), plain.eval()
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_noise_has_the_right_bound_by_sequence_and_none_on_padding(name):
    model = replace_embeddings(build(name), alpha=5.0)
    inputs = batch()
    noise = noise_in(model, inputs)
    # The encoder has the mask; a decoder that was given none takes its tokens as one full sequence each.
    first = "encoder" if "decoder_start_token_id" in model.config.to_dict() and len(noise) > 1 else ""
    masked = next((key for key in noise if first in key), next(iter(noise)))
    want = noise_magnitude(inputs["input_ids"], 16, 5.0, attention_mask=inputs["attention_mask"])
    largest = noise[masked].abs().amax(-1)
    # 1e-5 is what rounding to float32 at the values' size, below 32, can add to a difference of two.
    assert (largest <= want + 1e-5).all()
    # The largest of 16 draws falls below a tenth of the bound with probability 1e-16.
    assert (largest >= 0.1 * want).all()
    assert (largest[0, 4:] == 0).all()
    for key, decoder_noise in noise.items():
        if "decoder" in key:
            assert 0.1 < decoder_noise.abs().max() / noise_magnitude(inputs["input_ids"], 16, 5.0) <= 1 + 1e-5


def test_standard_deviation_is_that_of_a_uniform(name):
    model = replace_embeddings(build(name), alpha=5.0)
    inputs = {"input_ids": torch.randint(3, 50, (8, 64))}
    inputs["labels"] = inputs["input_ids"]
    for noise in noise_in(model, inputs).values():
        bound = 5.0 / (64 * 16) ** 0.5
        # 8192 draws: the standard error of the deviation is 0.5 %; six of them.
        assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert abs(noise.mean().item()) < 6 * bound / 3**0.5 / 8192**0.5


def test_gradients_without_noise_are_those_of_the_plain_model(name):
    model, plain = replace_embeddings(build(name), alpha=0.0), build(name)
    for each in (model, plain):
        each(**batch()).loss.backward()
    for (key, noisy), (_, untouched) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(noisy.grad, untouched.grad), key


def test_generation_in_training_mode_has_no_noise(name):
    model, plain = replace_embeddings(build(name), alpha=50.0), build(name)
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **settings), plain.generate(**inputs, **settings))


def test_a_cache_means_generation():
    model = replace_embeddings(build("llama"), alpha=50.0)
    plain = build("llama")
    ids = batch()["input_ids"]
    for each in (model, plain):
        each.config.use_cache = True
    name = generation.utils.ALL_CACHE_NAMES[0]
    with torch.no_grad():
        prompt = plain(ids, use_cache=True)[name]
    noisy = model(ids[:, :1], **{name: copy.deepcopy(prompt)}).logits
    assert torch.equal(noisy, plain(ids[:, :1], **{name: prompt}).logits)


def test_restore_brings_back_the_original(name):
    model, plain = build(name), build(name)
    replace_embeddings(model)
    model(**batch())
    assert restore_embeddings(model) is model
    for (key, module), (_, untouched) in zip(model.named_modules(), plain.named_modules(), strict=True):
        assert type(module) is type(untouched), key
        assert set(module.__dict__) == set(untouched.__dict__), key
        for hooks in (name for name in module.__dict__ if "hooks" in name):
            assert len(getattr(module, hooks)) == len(getattr(untouched, hooks)), (key, hooks)
    assert "no noisy embeddings" in str(describe(model))
    assert torch.equal(model(**batch()).loss, plain(**batch()).loss)


def test_a_second_call_replaces_the_first():
    model = replace_embeddings(replace_embeddings(build("llama"), alpha=5.0), alpha=1.0, scale_by="batch")
    (report,) = describe(model)
    assert (report.alpha, report.scale_by) == (1.0, "batch")
    (noise,) = noise_in(model, batch()).values()
    bound = 1.0 / (7 * 16) ** 0.5
    assert 0.5 * bound < noise[0, 4:].abs().max() <= bound + 1e-5


def test_a_bad_call_changes_nothing():
    model = replace_embeddings(build("llama"), alpha=5.0)
    for bad in ({"alpha": -1.0}, {"scale_by": "x"}, {"backend": "x"}, {"stream": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            replace_embeddings(model, **bad)
    with pytest.raises(RuntimeError, match="cuda"):
        replace_embeddings(model, backend="cuda")
    assert describe(model)[0].alpha == 5.0


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_noise_and_are_independent(name, copier):
    model = replace_embeddings(build(name), alpha=5.0)
    model(**batch())
    twin = copier(model)
    restore_embeddings(model)
    assert names(model) == []
    assert {report.state for report in describe(twin)} == {"on"}
    noise = noise_in(twin, batch())
    assert any((each != 0).any() for each in noise.values())
    assert any((each == 0).any() for each in noise.values())  # padding: the copy's hooks feed the copy's embeddings


def test_an_embedding_copied_alone_stays_one_of_its_models():
    model = replace_embeddings(build("llama"), alpha=5.0)
    model.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    model(**batch())
    assert describe(model)[0].last_magnitude == pytest.approx(
        (5.0 / (7 * 16) ** 0.5, 5.0 / (4 * 16) ** 0.5)
    )  # it sees the padding


def test_save_and_reload(name, tmp_path):
    model = replace_embeddings(build(name))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).train()
    assert names(again) == []
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_resized_embeddings_stay_noisy():
    model = replace_embeddings(build("llama"))
    model.resize_token_embeddings(64)
    inputs = {"input_ids": torch.full((1, 5), 63)}
    (noise,) = noise_in(model, inputs).values()
    assert (noise != 0).any()


def test_what_cannot_tell_lengths_is_noted():
    model = replace_embeddings(build("llama"))
    ids = batch()["input_ids"]
    model(input_ids=ids, attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool))
    (report,) = describe(model)
    assert "attention_mask of shape [2, 1, 7, 7]" in report.note
    assert "attention_mask" in str(report)
    assert report.last_magnitude == pytest.approx((5.0 / (7 * 16) ** 0.5,) * 2)


def test_packed_sequences_are_told_apart_by_position_ids():
    model = replace_embeddings(build("llama"))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    model(input_ids=batch()["input_ids"][:1], position_ids=positions)
    assert describe(model)[0].last_magnitude == pytest.approx((5 / (5 * 16) ** 0.5, 5 / (2 * 16) ** 0.5))


def test_an_error_in_forward_leaves_no_masks_behind():
    model = replace_embeddings(build("llama"))
    bad = batch()
    bad["input_ids"] = bad["input_ids"] + 100
    with pytest.raises(IndexError, match="input_ids"):
        model(**bad)
    assert model.model.embed_tokens.noise.shared.passes.batch is EMPTY_BATCH
    (noise,) = noise_in(model, batch()).values()
    assert (noise[0, 4:] == 0).all()


class Nested(nn.Module):
    """Looks tokens up again after a module inside it, which takes a mask of its own, has returned."""

    class Inner(nn.Module):
        def __init__(self, embedding):
            super().__init__()
            self.embedding = embedding

        def forward(self, ids, attention_mask=None):
            return self.embedding(ids)

    def __init__(self):
        super().__init__()
        self.inner = self.Inner(nn.Embedding(50, 16))
        self.copied = None

    def get_input_embeddings(self):
        return self.inner.embedding

    def forward(self, ids, attention_mask):
        inside = self.inner(ids, attention_mask=attention_mask.roll(1, -1))
        self.copied = pickle.loads(pickle.dumps(self.inner))
        return inside, self.inner.embedding(ids)


def test_the_outer_masks_are_back_when_an_inner_module_returns():
    model = replace_embeddings(Nested(), alpha=5.0)
    ids, mask = torch.arange(6)[None], torch.tensor([[1, 1, 1, 0, 0, 0]])
    plain = nn.functional.embedding(ids, model.inner.embedding.weight)
    inside, outside = model(ids, mask)
    assert torch.equal((inside != plain).any(-1), mask.roll(1, -1).bool())
    assert torch.equal((outside != plain).any(-1), mask.bool())
    # A copy made in the middle of a pass has nothing of that pass.
    assert model.copied.embedding.noise.shared.passes.batch is EMPTY_BATCH


def test_modules_built_noisy_are_copied_with_settings_of_their_own():
    model = nn.Sequential(NEFTuneEmbedding(10, 4, alpha=2.0))
    twin = copy.deepcopy(model)
    set_alpha(twin, 0.0)
    assert (describe(model)[0].alpha, describe(twin)[0].alpha) == (2.0, 0.0)


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


def test_inside_of_data_parallel_it_is_the_model_that_counts():
    name = "t5, shared table"
    model = replace_embeddings(nn.DataParallel(build(name)))
    assert names(model) == [f"module.{each}" for each in expected_in(model.module, name)]


def test_what_names_no_embedding_is_refused():
    config = transformers.CanineConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="CanineModel"):
        replace_embeddings(transformers.CanineModel(config))


def test_no_noise_nests_and_survives_errors():
    model = replace_embeddings(build("llama"))
    with no_noise(model):
        with no_noise(model):
            assert describe(model)[0].state == "off: inside no_noise"
        assert describe(model)[0].state == "off: inside no_noise"
    with pytest.raises(KeyError), no_noise(model):
        raise KeyError
    assert describe(model)[0].state == "on"


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


def test_peft_methods_that_look_tokens_up_by_themselves():
    from peft import PrefixTuningConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model

    configs = [
        TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2]),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ]
    for config in configs:
        model = replace_embeddings(get_peft_model(build("llama"), config).train(), alpha=5.0)
        inputs = batch()
        losses = {model(**inputs).loss.item() for _ in range(3)}
        assert len(losses) == 3, type(config)
        magnitudes = [report.last_magnitude for report in describe(model) if report.last_magnitude]
        assert magnitudes == [pytest.approx((5.0 / (7 * 16) ** 0.5, 5.0 / (4 * 16) ** 0.5))], type(config)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], "modules_to_save"])
def test_peft(when, targets):
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    config = LoraConfig(**(options if targets == "modules_to_save" else {"target_modules": targets}))
    model = build("llama")
    if when == "before":
        replace_embeddings(model, alpha=5.0)
    model = get_peft_model(model, config).train()
    if when == "after":
        replace_embeddings(model, alpha=5.0)
    inputs = batch()
    losses = {model(**inputs).loss.item() for _ in range(3)}
    assert len(losses) == 3
    with no_noise(model):
        assert len({model(**inputs).loss.item() for _ in range(3)}) == 1
    magnitudes = [report.last_magnitude for report in describe(model) if report.last_magnitude]
    assert magnitudes == [pytest.approx((5.0 / (7 * 16) ** 0.5, 5.0 / (4 * 16) ** 0.5))]  # the mask is seen; added once
    model.merge_and_unload() if targets == ["q_proj"] else None
    restore_embeddings(model)
    assert names(model) == []


def test_trainer(tmp_path):
    """The real Trainer: noise in its steps, none in its evaluation, and weights that torch.manual_seed reproduces."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 50, (12, 9)).tolist()]

    def train(alpha):
        model = build("llama")
        if alpha:
            replace_embeddings(model, alpha=alpha)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            seed=3,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
        before = [trainer.evaluate()["eval_loss"] for _ in range(2)]
        assert before[0] == before[1]
        trainer.train()
        return model.state_dict()

    first, second, plain = train(5.0), train(5.0), train(None)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], plain[key]) for key in first)


@pytest.mark.parametrize("name", ["llama", "t5, shared table"])
def test_compiling_a_noisy_model_breaks_no_graph_more(name):
    inputs = batch()
    breaks = []
    for noisy in (False, True):
        model = build(name)
        if noisy:
            replace_embeddings(model)
        torch._dynamo.reset()
        breaks.append(torch._dynamo.explain(model)(**inputs).graph_break_count)
    assert breaks[1] <= breaks[0]
