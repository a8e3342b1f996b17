"""Contract: what reaches an embedding is what the forward pass under way was told, by whomever, and nothing of another."""

import copy
import logging
import threading

import pytest
import torch
import transformers
from torch import nn
from transformers import generation

from helpers.models import build
from neft_kernels import describe, replace_embeddings, set_alpha
from neft_kernels.models.batch import CACHES

IDS = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
BY_LENGTH = (5.0 / (4 * 4) ** 0.5, 5.0 / (2 * 4) ** 0.5)  # of four tokens and of two, width 4


class Inner(nn.Module):
    """Looks tokens up; `fails` before it does so."""

    def __init__(self):
        super().__init__()
        self.embedding, self.fails = nn.Embedding(8, 4), None

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, labels=None):
        if self.fails is not None:
            raise self.fails
        return self.embedding(input_ids)


def last(model):
    (report,) = describe(model)
    return report.last_magnitude


def model_of(cls):
    model = cls()
    model.inner = Inner()
    model.get_input_embeddings = lambda: model.inner.embedding
    return replace_embeddings(model, alpha=5.0).train()


class Plain(nn.Module):
    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None):
        return self.inner(input_ids, attention_mask, position_ids, past_key_values)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_nothing_behind(interrupt):
    """Hooks that are always called are not after an interrupt."""
    model = model_of(Plain)
    model.inner.fails = interrupt()
    with pytest.raises(interrupt):
        model(IDS, attention_mask=MASK, past_key_values=object())
    model.inner.fails = None
    model(IDS)
    assert last(model) == pytest.approx((BY_LENGTH[0],) * 2)
    model(IDS, attention_mask=MASK)
    assert last(model) == pytest.approx(BY_LENGTH)


class TakesABatch(nn.Module):
    """As a Lightning module does."""

    def forward(self, batch):
        return self.inner(**batch)


def test_a_cache_is_seen_below_a_module_that_is_given_a_batch():
    model = model_of(TakesABatch)
    plain = nn.functional.embedding(IDS, model.inner.embedding.weight)
    assert torch.equal(model({"input_ids": IDS, "past_key_values": object()}), plain)
    assert not torch.equal(model({"input_ids": IDS}), plain)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_known_by_its_name(name):
    """Whatever its class; and a switch by that name is none."""
    model = model_of(TakesABatch)
    plain = nn.functional.embedding(IDS, model.inner.embedding.weight)
    model.inner.forward = lambda input_ids, **kwargs: model.inner.embedding(input_ids)
    assert torch.equal(model({"input_ids": IDS, name: object()}), plain)
    for none in (None, False, True):
        assert not torch.equal(model({"input_ids": IDS, name: none}), plain)


@pytest.mark.parametrize("cls", ["DynamicCache", "EncoderDecoderCache"])
def test_a_cache_of_transformers_is_known_by_its_class(cls):
    """Whatever the argument is called."""
    caches = [transformers.DynamicCache() for _ in range(2)]
    cache = caches[0] if cls == "DynamicCache" else transformers.EncoderDecoderCache(*caches)
    model = model_of(TakesABatch)
    plain = nn.functional.embedding(IDS, model.inner.embedding.weight)
    model.inner.forward = lambda input_ids, **kwargs: model.inner.embedding(input_ids)
    assert torch.equal(model({"input_ids": IDS, "memory_of_tomorrow": cache}), plain)
    for no_cache in (object(), torch.ones(2), [torch.ones(2)]):
        assert not torch.equal(model({"input_ids": IDS, "memory_of_tomorrow": no_cache}), plain)


def test_caches_have_the_names_that_transformers_gives_them():
    """So that the next one to be renamed is noticed here; test_architectures looks at what the models call theirs."""
    in_generation = {*generation.utils.ALL_CACHE_NAMES} - {"mems", "state"}  # models are given those in training too
    not_placed = {*(transformers.PreTrainedModel._skip_keys_device_placement or ())}
    assert in_generation | not_placed <= {*CACHES}


class MakesACache(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids, past_key_values=object())


class MakesACacheAndHasOtherNames(nn.Module):
    def forward(self, tokens, attention_mask=None):
        return self.inner(tokens, past_key_values=object())


@pytest.mark.parametrize(
    ("cls", "mask"), [(MakesACache, None), (MakesACache, MASK), (MakesACacheAndHasOtherNames, MASK)]
)
def test_a_cache_that_a_model_makes_and_passes_on_within_itself_is_none(cls, mask):
    model = model_of(cls)
    assert not torch.equal(model(IDS, attention_mask=mask), model.inner.embedding.weight[IDS])


class TurnsTheIds(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids.flip(1))


def test_a_mask_is_not_passed_on_to_other_ids():
    model = model_of(TurnsTheIds)
    model(IDS, attention_mask=MASK)
    assert last(model) == pytest.approx((BY_LENGTH[0],) * 2)


class HasOtherNames(nn.Module):
    """Nothing says whether the ids inside are those around."""

    class Middle(nn.Module):
        def forward(self, tokens, attention_mask=None):
            return self.inner.embedding(tokens)

    def __init__(self):
        super().__init__()
        self.middle = self.Middle()

    def forward(self, tokens, attention_mask=None):
        return self.middle(tokens.flip(1))


def test_a_mask_is_not_passed_on_to_ids_that_may_be_others():
    model = HasOtherNames()
    model.middle.inner = Inner()
    model.get_input_embeddings = lambda: model.middle.inner.embedding
    replace_embeddings(model, alpha=5.0).train()
    model(IDS, attention_mask=MASK)
    assert last(model) == pytest.approx((BY_LENGTH[0],) * 2)


def test_a_thread_without_a_pass_knows_nothing_of_anothers():
    model = model_of(Plain)

    def look_up_in_a_thread(module, args):
        def look_up():
            torch.set_grad_enabled(True)
            model.inner.embedding(IDS)
            seen.append(last(model))

        thread = threading.Thread(target=look_up)
        thread.start()
        thread.join()

    seen = []
    model.inner.register_forward_pre_hook(look_up_in_a_thread)
    model(IDS, attention_mask=MASK)
    assert seen == [pytest.approx((BY_LENGTH[0],) * 2)]
    assert last(model) == pytest.approx(BY_LENGTH)


def test_a_schedule_counts_the_passes_of_whatever_module_is_called():
    model = replace_embeddings(model_of(Plain), alpha=lambda step: float(step))
    for _ in range(3):
        model.inner(IDS)
    model(IDS)
    assert describe(model)[0].alpha == 3.0


def test_a_step_that_is_told_holds_until_another_is_told():
    """Then passes are counted on from it; a new schedule does not begin anew, nor is a pass counted twice."""
    model = model_of(Plain)
    seen = []

    def passes(count):
        for _ in range(count):
            model(IDS)
            seen.append(describe(model)[0].alpha)

    set_alpha(model, lambda step: 1.0 + step)
    passes(2)
    set_alpha(model, lambda step: 11.0 + step)
    passes(2)
    for step in (7, 0):
        set_alpha(model, lambda step: 1.0 + step, step=step)
        passes(2)
    set_alpha(model, lambda step: 1.0 + step)
    passes(2)
    assert seen == [1.0, 2.0, 13.0, 14.0, 8.0, 8.0, 1.0, 1.0, 1.0, 2.0]


def test_a_schedule_that_goes_wrong_later_is_an_error_then():
    model = model_of(Plain)
    set_alpha(model, lambda step: 1.0 - step)
    model(IDS)
    model(IDS)
    with pytest.raises(ValueError, match="alpha must be finite and >= 0, not -1"):
        model(IDS)


def test_a_copy_that_is_called_inside_of_a_pass_knows_nothing_of_it():
    """As a teacher or an average of the weights is, inside of what it was copied from."""
    model = model_of(Plain)
    twin = copy.deepcopy(model)
    model.inner.register_forward_pre_hook(lambda module, args: [None, twin.inner.embedding(IDS)][0])
    model(IDS, attention_mask=MASK)
    assert last(model) == pytest.approx(BY_LENGTH)
    assert last(twin) == pytest.approx((BY_LENGTH[0],) * 2)


class PositionsOnly(nn.Module):
    """Calls a module that takes the ids and positions, but no mask, with the ids alone."""

    class Middle(nn.Module):
        def forward(self, input_ids, position_ids=None):
            return self.inner.embedding(input_ids)

    def __init__(self):
        super().__init__()
        self.middle = self.Middle()

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.middle(input_ids)


def test_what_is_known_of_the_same_ids_is_known_inside():
    model = PositionsOnly()
    model.middle.inner = Inner()
    model.get_input_embeddings = lambda: model.middle.inner.embedding
    replace_embeddings(model, alpha=5.0).train()
    model(IDS, position_ids=torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]))
    assert last(model) == pytest.approx(BY_LENGTH)


class TakesAll(nn.Module):
    def forward(self, input_ids, attention_mask=None, position_ids=None, cu_seq_lens_q=None, labels=None):
        return self.inner.embedding(input_ids)


ONE_ROW = IDS.view(1, 8)
#: What tells the lengths of ids, and the lengths of the longest and the shortest sequence.
USABLE = {
    "positions of one row for all": (IDS, {"position_ids": torch.tensor([[0, 1, 0, 1]])}, (2, 2)),
    "positions without a row": (IDS, {"position_ids": torch.tensor([0, 1, 2, 0])}, (3, 3)),
    "boundaries of one row": (ONE_ROW, {"cu_seq_lens_q": torch.tensor([0, 3, 8])}, (5, 3)),
    "boundaries of one sequence": (ONE_ROW, {"cu_seq_lens_q": torch.tensor([0, 8])}, (8, 8)),
    "as many boundaries as tokens": (
        ONE_ROW,
        {"cu_seq_lens_q": torch.tensor([0, 1, 2, 3, 4, 5, 8, 8, 8])},
        (3, 1),
    ),
    "a mask that begins with a prefix": (IDS, {"attention_mask": torch.cat((MASK * 0 + 1, MASK), 1)}, (4, 2)),
}
#: What does not.
UNUSABLE = {
    "a mask of one row for all": (IDS, {"attention_mask": MASK[:1]}),
    "a mask that is too short": (IDS, {"attention_mask": MASK[:, :3]}),
    "a mask of queries and keys": (IDS, {"attention_mask": torch.ones(2, 1, 4, 9)}),
    "positions with a prefix": (IDS, {"position_ids": torch.arange(6).expand(2, 6)}),
    "positions of three kinds": (IDS, {"position_ids": torch.arange(4).expand(3, 2, 4)}),
    "positions for another batch": (IDS, {"position_ids": torch.arange(4).expand(3, 4)}),
    "one position": (IDS, {"position_ids": torch.tensor(3)}),
    "boundaries for two rows": (IDS, {"cu_seq_lens_q": torch.tensor([0, 3, 4])}),
    "boundaries of nothing": (ONE_ROW, {"cu_seq_lens_q": torch.tensor([0])}),
    "more sequences than tokens": (ONE_ROW, {"cu_seq_lens_q": torch.arange(10)}),
    "boundaries of two rows": (ONE_ROW, {"cu_seq_lens_q": torch.tensor([[0, 3, 8], [0, 3, 8]])}),
}


@pytest.mark.parametrize("case", USABLE)
def test_what_tells_the_lengths_is_used(case):
    ids, given, (longest, shortest) = USABLE[case]
    model = model_of(TakesAll)
    model(ids, **given)
    assert last(model) == pytest.approx((5.0 / (longest * 4) ** 0.5, 5.0 / (shortest * 4) ** 0.5))
    assert describe(model)[0].note == ""


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_does_not_tell_the_lengths_is_noted_and_the_padded_length_holds(case):
    ids, given = UNUSABLE[case]
    ((name, value),) = given.items()
    model = model_of(TakesAll)
    model(ids, **given)
    assert last(model) == pytest.approx((5.0 / (ids.shape[-1] * 4) ** 0.5,) * 2)
    assert describe(model)[0].note == (
        f"{name.removesuffix('_q')} of shape {list(value.shape)} does not tell the lengths of ids of shape {list(ids.shape)}"
    )


class MoreArguments(nn.Module):
    def forward(self, input_ids, *more, attention_mask=None):
        return self.inner(input_ids)


def test_further_positional_arguments_are_no_mask():
    model = model_of(MoreArguments)
    model(IDS, torch.zeros(2, 4), torch.zeros(2, 4))
    assert last(model) == pytest.approx((BY_LENGTH[0],) * 2)


class LeavesTheGraph(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return self.look_up(input_ids) * 2

    @torch.compiler.disable
    def look_up(self, input_ids):
        return self.inner.embedding(input_ids)


class LeavesTheGraphForAModule(LeavesTheGraph):
    @torch.compiler.disable
    def look_up(self, input_ids):
        return self.inner(input_ids)


def test_of_a_compiled_pass_nothing_is_left_in_what_it_called_outside_of_its_graph():
    model = model_of(LeavesTheGraphForAModule)
    torch._dynamo.reset()
    torch.compile(model, backend="eager")(IDS, attention_mask=MASK)
    model.inner.embedding(IDS)
    assert last(model) == pytest.approx((BY_LENGTH[0],) * 2)


def test_a_compiled_module_tells_what_it_calls_outside_of_its_graph():
    model = model_of(LeavesTheGraph)
    torch._dynamo.reset()
    torch.compile(model, backend="eager")(IDS, attention_mask=MASK)
    assert last(model) == pytest.approx(BY_LENGTH)
    model(IDS)  # and nothing is left of it
    assert last(model) == pytest.approx((BY_LENGTH[0],) * 2)


def test_a_cache_in_training_is_taken_for_generation_with_a_warning(caplog):
    """Once; not with labels, nor where gradients are disabled, as they are when a model generates."""
    model = replace_embeddings(build("llama"))

    def cache():
        return {generation.utils.ALL_CACHE_NAMES[0]: transformers.DynamicCache(config=model.config)}

    def warnings():
        return [record for record in caplog.records if record.name == "neft_kernels"]

    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        model(input_ids=IDS, **cache(), labels=IDS)
        with torch.no_grad():
            model(input_ids=IDS, **cache())
        assert not warnings()
        for _ in range(2):
            model(input_ids=IDS, **cache())
    (record,) = warnings()
    assert "a cache was passed to the model in training" in record.message
