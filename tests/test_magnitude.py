"""Contract: alpha / sqrt(L * d) with each sequence's own L; padding gets none; a mask of ones changes no bit."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.devices import CPU_BACKENDS
from neft_kernels import noise_magnitude
from neft_kernels.ops import magnitude as magnitude_module
from neft_kernels.ops.registration import OVERLOADS

D, ALPHA = 16, 5.0
# What computes the magnitudes of tensors on the CPU: plain torch, where the backend has no kernel for it, or a kernel.
COMPUTED_BY = ("reference", *(backend for backend in CPU_BACKENDS if backend in OVERLOADS["token_magnitude"]))


@pytest.fixture(params=COMPUTED_BY, autouse=True)
def computed_by(request, monkeypatch):
    kernel = OVERLOADS["token_magnitude"].get(request.param)
    monkeypatch.setattr(magnitude_module, "magnitude_kernel", lambda device_type, backend: kernel)
    return request.param


def expected(length):
    return torch.tensor(ALPHA / math.sqrt(length * D), dtype=torch.float64).float().item()


def lengths(*rows):
    return torch.tensor([[expected(length) if length else 0.0 for length in row] for row in rows])


def ids(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def test_without_masks_it_is_one_number_for_both_scales():
    for scale_by in ("sequence", "batch"):
        assert noise_magnitude(ids(3, 7), D, ALPHA, scale_by=scale_by) == ALPHA / math.sqrt(7 * D)
        assert noise_magnitude(ids(7), D, ALPHA, scale_by=scale_by) == ALPHA / math.sqrt(7 * D)


def test_padding_left_right_and_whole_rows():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    want = lengths([3, 3, 3, 0], [0, 0, 2, 2], [4, 4, 4, 4], [0, 0, 0, 0])
    for dtype in (torch.int64, torch.bool, torch.float32, torch.int32):
        assert torch.equal(noise_magnitude(ids(4, 4), D, ALPHA, attention_mask=mask.to(dtype)), want)


def test_a_mask_of_ones_gives_exactly_what_no_mask_gives():
    for length in range(1, 200):
        number = noise_magnitude(ids(1, length), D, ALPHA)
        tensor = noise_magnitude(ids(1, length), D, ALPHA, attention_mask=torch.ones(1, length))
        assert (tensor == torch.tensor(number, dtype=torch.float32)).all()


def test_a_hole_in_the_mask_does_not_split_the_sequence():
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    assert torch.equal(noise_magnitude(ids(1, 5), D, ALPHA, attention_mask=mask), lengths([4, 4, 0, 4, 4]))


def test_sequences_numbered_in_the_mask():
    mask = torch.tensor([[1, 1, 1, 2, 2, 3, 0], [1, 2, 2, 2, 2, 2, 2]])
    want = lengths([3, 3, 3, 2, 2, 1, 0], [1, 6, 6, 6, 6, 6, 6])
    assert torch.equal(noise_magnitude(ids(2, 7), D, ALPHA, attention_mask=mask), want)


def test_packed_by_position_ids():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
    want = lengths([3, 3, 3, 1, 2, 2], [6] * 6)
    assert torch.equal(noise_magnitude(ids(2, 6), D, ALPHA, position_ids=positions), want)
    # A row for all; a sequence that does not begin at 0.
    assert torch.equal(noise_magnitude(ids(2, 6), D, ALPHA, position_ids=positions[0]), want[:1].expand(2, 6))
    offset = torch.tensor([[7, 8, 9, 3, 0, 1]])
    assert torch.equal(noise_magnitude(ids(1, 6), D, ALPHA, position_ids=offset), want[:1])


ONES = [1] * 6
#: Positions, the mask or None, and the length of each token's sequence, 0 for padding.
POSITIONS = {
    "a jump ahead beside a mask": ([0, 1, 2, 1000, 1001, 1002], ONES, [6] * 6),
    "a repeated position beside a mask": ([0, 1, 1, 1, 2, 3], ONES, [6] * 6),
    "packed beside a mask of ones": ([0, 1, 2, 0, 1, 2], ONES, [3] * 6),
    "positions that decrease beside a mask": ([5, 6, 7, 3, 4, 5], ONES, [3] * 6),
    "padding on the left beside its mask": ([1, 1, 1, 0, 1, 2], [0, 0, 0, 1, 1, 1], [0, 0, 0, 3, 3, 3]),
    "padding on the left without a mask": ([1, 1, 1, 0, 1, 2], None, [0, 0, 0, 3, 3, 3]),
    "one token of padding on the left": ([1, 0, 1, 2, 3, 4], None, [0, 5, 5, 5, 5, 5]),
    "padding on the right without a mask": ([0, 1, 2, 1, 1, 1], None, [3, 3, 3, 0, 0, 0]),
    "a jump ahead without a mask": ([0, 1, 2, 1000, 1001, 1002], None, [3] * 6),
    "packed padding with a mask of 1 and position 0": ([0, 1, 2, 0, 0, 0], ONES, [3, 3, 3, 0, 0, 0]),
    "one token of packed padding": ([0, 1, 0, 1, 2, 0], ONES, [2, 2, 3, 3, 3, 0]),
    "sequences of one token inside": ([0, 0, 0, 1, 2, 3], ONES, [1, 1, 4, 4, 4, 4]),
    "nothing but packed padding": ([0] * 6, ONES, [0] * 6),
    "one token behind padding that the mask tells": ([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]),
    "packed padding before padding that the mask tells": ([0, 1, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0], [3, 3, 3, 1, 0, 0]),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_where_a_sequence_begins_and_what_is_padding_by_position(case):
    positions, mask, want = POSITIONS[case]
    given = {} if mask is None else {"attention_mask": torch.tensor([mask])}
    got = noise_magnitude(ids(1, 6), D, ALPHA, position_ids=torch.tensor([positions]), **given)
    assert torch.equal(got, lengths(want))


def test_packed_and_padded():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    got = noise_magnitude(ids(1, 7), D, ALPHA, position_ids=positions, attention_mask=mask)
    assert torch.equal(got, lengths([3, 3, 3, 2, 2, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_by_cu_seq_lens(dtype):
    boundaries = torch.tensor([0, 3, 4, 6], dtype=dtype)
    assert torch.equal(noise_magnitude(ids(1, 6), D, ALPHA, cu_seq_lens=boundaries), lengths([3, 3, 3, 1, 2, 2]))
    assert torch.equal(noise_magnitude(ids(6), D, ALPHA, cu_seq_lens=boundaries), lengths([3, 3, 3, 1, 2, 2])[0])
    # Tokens after the last boundary are padding; an empty sequence is none.
    boundaries = torch.tensor([0, 3, 3, 5], dtype=dtype)
    assert torch.equal(noise_magnitude(ids(1, 7), D, ALPHA, cu_seq_lens=boundaries), lengths([3, 3, 3, 2, 2, 0, 0]))


def test_boundaries_may_be_elsewhere_than_the_ids():
    """They are few, and often on the CPU."""
    magnitude = noise_magnitude(ids(1, 6).to("meta"), D, ALPHA, cu_seq_lens=torch.tensor([0, 3, 6]))
    assert (magnitude.shape, magnitude.device.type) == ((1, 6), "meta")


def test_padding_at_the_end_of_a_packed_row_gets_none():
    """Collators pad positions with 0 and give no mask, so that each padding token looks like a sequence of its own."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])
    want = lengths([3, 3, 3, 2, 2, 0, 0, 0])
    assert torch.equal(noise_magnitude(ids(1, 8), D, ALPHA, position_ids=positions), want)
    boundaries = torch.tensor([0, 3, 5, 6, 7, 8])
    assert torch.equal(noise_magnitude(ids(1, 8), D, ALPHA, cu_seq_lens=boundaries), want)


def test_labels_choose_the_tokens():
    labels = torch.tensor([[-100, -100, 7, 8], [-100, 5, 6, -100]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    for options, full in (({}, lengths([4] * 4, [4] * 4)), ({"attention_mask": mask}, lengths([4] * 4, [3, 3, 3, 0]))):
        prompt = noise_magnitude(ids(2, 4), D, ALPHA, labels=labels, noise_on="prompt", **options)
        completion = noise_magnitude(ids(2, 4), D, ALPHA, labels=labels, noise_on="completion", **options)
        assert torch.equal(prompt, full * (labels == -100))
        assert torch.equal(completion, full * (labels != -100))
    with pytest.raises(ValueError, match="needs labels"):
        noise_magnitude(ids(2, 4), D, ALPHA, noise_on="prompt")
    with pytest.raises(ValueError, match=r"labels.*\[2, 4\]"):
        noise_magnitude(ids(2, 5), D, ALPHA, labels=labels, noise_on="prompt")


def test_alpha_as_a_tensor_gives_the_same_values():
    for mask in (None, torch.tensor([[1, 1, 1, 0]])):
        number = noise_magnitude(ids(1, 4), D, ALPHA, attention_mask=mask)
        tensor = noise_magnitude(ids(1, 4), D, torch.tensor(ALPHA, dtype=torch.float64), attention_mask=mask)
        assert torch.equal(tensor, torch.as_tensor(number, dtype=torch.float32))


def test_alpha_as_a_tensor_is_not_looked_at():
    """As on the meta device, where it has no value."""
    tokens, alpha = ids(2, 4).to("meta"), torch.tensor(ALPHA, dtype=torch.float64, device="meta")
    for masks in ({}, {"attention_mask": tokens}, {"position_ids": tokens}):
        assert noise_magnitude(tokens, D, alpha, **masks).shape in ((), (2, 4))


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_fake_tensors_have_the_shape_and_dtype_of_real_ones(name):
    with FakeTensorMode() as fakes:
        tokens = fakes.from_tensor(ids(2, 5))
        magnitude = noise_magnitude(tokens, D, ALPHA, **{name: tokens})
    assert (magnitude.shape, magnitude.dtype, magnitude.device.type) == ((2, 5), torch.float32, "cpu")


def test_one_token_is_a_sequence_and_no_padding():
    for shape in ((1, 1), (3, 1), (1,)):
        got = noise_magnitude(ids(*shape), D, ALPHA, position_ids=ids(*shape))
        assert torch.equal(got, torch.full(shape, expected(1)))
    assert torch.equal(noise_magnitude(ids(1), D, ALPHA, cu_seq_lens=torch.tensor([0, 1])), lengths([1])[0])


def test_scale_by_batch_ignores_masks():
    mask = torch.tensor([[1, 1, 0, 0]])
    assert noise_magnitude(ids(1, 4), D, ALPHA, attention_mask=mask, scale_by="batch") == ALPHA / math.sqrt(4 * D)


def test_no_tokens_and_no_sequence():
    assert noise_magnitude(ids(), D, ALPHA) == 0
    assert noise_magnitude(ids(2, 0), D, ALPHA, attention_mask=torch.ones(2, 0)) == 0
    assert noise_magnitude(ids(2, 5), D, 0) == 0


def test_higher_dimensions():
    mask = torch.ones(2, 3, 4)
    mask[0, 1, 2:] = 0
    got = noise_magnitude(ids(2, 3, 4), D, ALPHA, attention_mask=mask)
    assert torch.equal(got[0, 1], lengths([2, 2, 0, 0])[0])
    assert torch.equal(got[1], lengths(*[[4] * 4] * 3))


def test_kernels_give_the_bits_of_plain_torch(computed_by, monkeypatch):
    """Random masks and positions, as long as two tiles of the Triton kernel and shorter, and with what no collator makes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, to):
        return torch.randint(to, shape, generator=generator)

    cases = []
    for shape in ((1, 1), (3, 2), (2, 3, 37), (1, 5000)):
        starts = (random(*shape, to=6) == 0).int()
        positions = torch.arange(shape[-1]) - (torch.arange(shape[-1]) * starts).cummax(-1).values
        masks = [
            random(*shape, to=2),
            random(*shape, to=4) - 1,
            random(*shape, to=shape[-1] + 3),
            random(*shape, to=2).bool(),
        ]
        masks.append(masks[1].mT.contiguous().mT)
        cases += [{"attention_mask": mask} for mask in masks]
        cases += [{"attention_mask": masks[0] / 2, "position_ids": positions}, {"position_ids": positions / 2}]
        cases += [{"position_ids": each} for each in (positions, positions.int(), random(*shape, to=3), positions[:1])]
        cases += [{"position_ids": positions, "attention_mask": mask} for mask in masks]
        ended = positions.clone()
        ended[..., shape[-1] // 2 :] = 0  # padding at the end
        cases.append({"position_ids": ended})
    for case in cases:
        tokens = ids(*next(reversed(case.values())).shape)
        got = noise_magnitude(tokens, 48, 7.3, **case)
        with monkeypatch.context() as patched:
            patched.setattr(magnitude_module, "magnitude_kernel", lambda *_: None)
            want = noise_magnitude(tokens, 48, 7.3, **case)
        assert got.dtype == torch.float32
        assert torch.equal(got, want), case


def test_sequences_that_end_in_another_tile(computed_by, monkeypatch):
    """Tiles of a few tokens, so that sequences begin and end in any of them, and lie in parts of several."""
    if computed_by == "triton":
        from neft_kernels.ops import triton_magnitude

        monkeypatch.setattr(triton_magnitude, "MOST_TOKENS", 8)
        monkeypatch.setattr(triton_magnitude, "MOST_TOKENS_AT_ONCE", 16)
    generator = torch.Generator().manual_seed(3)
    for mean, length in ((2, 61), (20, 61), (100, 64), (7, 8), (3, 17)):
        starts = (torch.rand(6, length, generator=generator) < 1 / mean).long()
        numbers = starts.cumsum(-1)
        positions = torch.arange(length) - (torch.arange(length) * starts).cummax(-1).values
        ends = torch.randint(length + 1, (6, 1), generator=generator)
        padded = torch.arange(length) >= ends
        shuffled = torch.randperm(length + 1, generator=generator)[numbers]  # the numbers in any order
        holes = torch.rand(6, length, generator=generator) < 0.3
        cases = [
            {"attention_mask": each.masked_fill(padded, 0)}
            for each in (numbers + 1, shuffled, holes.long(), numbers % 3)
        ]
        cases += [{"position_ids": each} for each in (positions, positions.masked_fill(padded, 0), positions.flip(-1))]
        left = positions.masked_fill(~padded, 1)  # padding, as transformers numbers it
        cases += [{"position_ids": each} for each in (left, positions.masked_fill(holes, 1))]
        repeated = positions // 2
        cases += [
            {"position_ids": each, "attention_mask": mask.long()}
            for each in (positions, repeated, 3 * positions)
            for mask in (~padded, holes, padded)
        ]
        for case in cases:
            got = noise_magnitude(ids(6, length), 48, 7.3, **case)
            with monkeypatch.context() as patched:
                patched.setattr(magnitude_module, "magnitude_kernel", lambda *_: None)
                want = noise_magnitude(ids(6, length), 48, 7.3, **case)
            assert torch.equal(got, want), case


def test_every_bit_of_alpha_counts():
    """The words that kernels get it in have their highest bits set, or not."""
    mask = torch.tensor([[1, 1, 0]])
    for alpha in (0.1, 5.0, 1 / 3, 2 / 3, 1e-300, math.pi):
        want = torch.tensor(alpha / math.sqrt(2 * D), dtype=torch.float64).float()
        assert noise_magnitude(ids(1, 3), D, alpha, attention_mask=mask).tolist() == [[want, want, 0.0]], alpha


def test_without_any_alpha_there_is_none():
    """Also where a schedule begins with 0, whose bits are those of a small integer."""
    for case in ({"attention_mask": torch.tensor([[1, 1, 0]])}, {"position_ids": torch.tensor([[0, 1, 0]])}):
        for alpha in (0.0, 0, 5e-324):
            assert noise_magnitude(ids(1, 3), D, alpha, **case).tolist() == [[0.0, 0.0, 0.0]]


def test_compiled_is_a_tensor_of_the_same_value_and_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda tokens: noise_magnitude(tokens, D, ALPHA), fullgraph=True, dynamic=True, backend=counter
    )
    for length in (3, 8, 21):
        assert compiled(ids(2, length)).item() == expected(length)
    assert counter.frame_count == 1
