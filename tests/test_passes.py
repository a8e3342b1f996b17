"""Contract: what reaches an embedding is what the forward pass under way was told, by whomever, and nothing of another."""

import copy
import threading

import pytest
import torch
from torch import nn

from helpers.passes import BY_LENGTH, IDS, MASK, Inner, last, model_of
from neft_kernels import describe, replace_embeddings, set_alpha


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
