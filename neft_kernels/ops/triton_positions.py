"""Sequences by their positions, on GPUs: functions of the Triton kernel in :mod:`neft_kernels.ops.triton_magnitude`."""

import triton
import triton.language as tl

__all__ = ["by_masked_position", "by_position", "load_row"]


@triton.jit
def load_row(first_of_row, token, inside):
    return tl.load(first_of_row + token, mask=inside, other=0)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


# --- by positions alone ----------------------------------------------------------------------------------------------


@triton.jit
def _load_begins(positions, token, inside):
    """Whether each token begins a sequence; False outside of the row."""
    here = load_row(positions, token, inside)
    before = load_row(positions, token - 1, inside & (token > 0))
    return inside & ((token == 0) | (here != before + 1))


@triton.jit
def _tokens_before(positions, begin, STEP: tl.constexpr):
    """The number of tokens before `begin` in the same sequence. Token `begin` must not start a sequence."""
    tokens = 0
    searching = True
    end = begin
    while searching:
        token = end - 1 - tl.arange(0, STEP)
        inside = token >= 0
        start = tl.max(tl.where(_load_begins(positions, token, inside), token, -1), 0)
        tokens += tl.sum((inside & (token >= start)).to(tl.int32), 0)
        searching = start < 0
        end -= STEP
    return tokens


@triton.jit
def _tokens_after(positions, end, length, STEP: tl.constexpr):
    """How many tokens from `end` on continue the sequence of token `end - 1`; and whether any of them continues the sequence
    of the token before it."""
    tokens = 0
    is_open = True
    is_followed = False
    searching = end < length
    begin = end
    while searching:
        token = begin + tl.arange(0, STEP)
        inside = token < length
        begins = _load_begins(positions, token, inside)
        if is_open:
            next_begin = tl.min(tl.where(begins, token, length), 0)
            tokens += tl.sum((inside & (token < next_begin)).to(tl.int32), 0)
            is_open = next_begin == length
        is_followed = is_followed | (tl.max((inside & (begins == 0)).to(tl.int32), 0) > 0)
        begin += STEP
        searching = (begin < length) & (is_open | (is_followed == 0))
    return tokens, is_followed


@triton.jit
def by_position(positions, begin, length, TILE: tl.constexpr, STEP: tl.constexpr):
    """For each token of a tile the length of its sequence, and whether it gets noise."""
    token = begin + tl.arange(0, TILE)
    inside = token < length
    begins = _load_begins(positions, token, inside)
    continues = tl.sum((begins & (token == begin)).to(tl.int32), 0) == 0
    before = 0
    if continues:
        before = _tokens_before(positions, begin, STEP)
    after, is_followed = _tokens_after(positions, begin + TILE, length, STEP)

    # The first token of the sequence of each token, and the first one of the next. Both grow, so the last is the largest.
    first = tl.associative_scan(tl.where(begins, token, begin - before), 0, _larger)
    next_begins = _load_begins(positions, token + 1, (token + 1 < length) & (token - begin < TILE - 1))
    end = tl.associative_scan(
        tl.where(next_begins, token + 1, tl.minimum(begin + TILE, length) + after), 0, _smaller, reverse=True
    )
    tokens = end - first
    # Collators that pack pad positions with 0 and give no mask: each padding token looks like a sequence.
    last = tl.max(tl.where(inside & ((tokens > 1) | (length == 1)), token, -1), 0)
    # transformers gives padding on the left the position 1, so each token of it looks like a sequence of one.
    is_filling = (tokens == 1) & (load_row(positions, token, inside) == 1) & (length > 1)
    return tokens, inside & ((token <= last) | is_followed) & (is_filling == 0)


# --- by positions beside a mask --------------------------------------------------------------------------------------
# Padding that the mask tells is passed over: a sequence begins at a token whose position is 0, or less than that of the last
# token before it which is no padding.

_NONE = tl.constexpr(-(2**63))  # the position of a token that is not there


@triton.jit
def _last_known(a, b):
    return tl.where(b == _NONE, a, b)


@triton.jit
def _load_known(mask, positions, token, inside):
    """The positions of tokens, or _NONE for padding and outside of the row."""
    return tl.where(load_row(mask, token, inside) != 0, load_row(positions, token, inside), _NONE)


@triton.jit
def _is_begin(position, before):
    return (position != _NONE) & ((position == 0) | (position < before))


@triton.jit
def _position_before(mask, positions, end, STEP: tl.constexpr):
    """The position of the last token before `end` that is no padding, or _NONE."""
    position = tl.full([], _NONE, tl.int64)
    while (end > 0) & (position == _NONE):
        token = end - 1 - tl.arange(0, STEP)
        known = _load_known(mask, positions, token, token >= 0)
        last = tl.max(tl.where(known == _NONE, -1, token), 0)
        position = tl.where(last < 0, _NONE, tl.sum(tl.where(token == last, known, 0), 0))
        end -= STEP
    return position


@triton.jit
def _masked_tokens_before(mask, positions, end, STEP: tl.constexpr):
    """How many tokens before `end` belong to the sequence of the last one that is no padding."""
    tokens = 0
    after = tl.full([], _NONE, tl.int64)  # the position of the token that follows on those looked at
    searching = end > 0
    above = end
    while searching:
        token = above - 1 - tl.arange(0, STEP)  # from the last one to the first
        known = _load_known(mask, positions, token, token >= 0)
        nearest = tl.associative_scan(
            _load_known(mask, positions, token + 1, (token >= 0) & (token + 1 < above)), 0, _last_known
        )
        following = tl.where(nearest == _NONE, after, nearest)
        begins_here = known == 0
        begins_next = (known != _NONE) & (following != _NONE) & (following < known)
        first = tl.max(tl.where(begins_next, token + 1, tl.where(begins_here, token, -1)), 0)
        tokens += tl.sum(((known != _NONE) & (token >= first)).to(tl.int32), 0)
        lowest = tl.min(tl.where(known == _NONE, end, token), 0)
        after = tl.where(lowest == end, after, tl.sum(tl.where(token == lowest, known, 0), 0))
        above -= STEP
        searching = (above > 0) & (first < 0)
    return tokens


@triton.jit
def _masked_tokens_after(mask, positions, end, length, before, is_tail, STEP: tl.constexpr):
    """How many tokens from `end` on belong to the sequence of the last one before, whose position is `before`; and whether,
    if `is_tail`, all of them are sequences of one token."""
    tokens = 0
    is_open = True
    searching = end < length
    begin = end
    while searching:
        token = begin + tl.arange(0, STEP)
        inside = token < length
        known = _load_known(mask, positions, token, inside)
        nearest = tl.associative_scan(_load_known(mask, positions, token - 1, inside & (token > begin)), 0, _last_known)
        begins = _is_begin(known, tl.where(nearest == _NONE, before, nearest))
        next_begin = tl.min(tl.where(begins, token, length), 0)
        tokens += tl.where(is_open, tl.sum(((known != _NONE) & (token < next_begin)).to(tl.int32), 0), 0)
        is_open = is_open & (next_begin == length)
        is_tail = is_tail & (tl.max((inside & (begins == 0)).to(tl.int32), 0) == 0)
        last = tl.max(tl.where(known == _NONE, -1, token), 0)
        before = tl.where(last < 0, before, tl.sum(tl.where(token == last, known, 0), 0))
        begin += STEP
        searching = (begin < length) & (is_open | is_tail)
    return tokens, is_tail


@triton.jit
def _follows_padding(mask, positions, end, STEP: tl.constexpr):
    """Whether the run of sequences of one token that `end` continues begins behind padding that the mask tells.

    A first token of the row that is no padding counts as such a sequence.
    """
    follows = False
    searching = end > 0
    while searching:
        token = end - 1 - tl.arange(0, STEP)
        known = _load_known(mask, positions, token, token >= 0)
        before = _load_known(mask, positions, token - 1, token > 0)
        # Sequences of one token beside each other.
        continues = (known != _NONE) & ((token == 0) | ((before != _NONE) & _is_begin(known, before)))
        stop = tl.max(tl.where((token >= 0) & (continues == 0), token, -1), 0)
        end -= STEP
        searching = (end > 0) & (stop < 0)
        if stop >= 0:
            at_stop = tl.max(tl.where(token == stop, known, _NONE), 0)
            before_stop = tl.max(tl.where(token == stop, before, _NONE), 0)
            if (at_stop == _NONE) | ((before_stop == _NONE) & (at_stop == 0)):
                follows = True
            elif before_stop == _NONE:
                farther = _position_before(mask, positions, stop, STEP)
                follows = (farther == _NONE) | (at_stop < farther)
    return follows


@triton.jit
def by_masked_position(mask, positions, begin, length, TILE: tl.constexpr, STEP: tl.constexpr):
    """As :func:`by_position`."""
    token = begin + tl.arange(0, TILE)
    inside = token < length
    known = _load_known(mask, positions, token, inside)
    present = known != _NONE
    # The rest of the row does not count for a tile of nothing but padding.
    is_padding = tl.max(present.to(tl.int32), 0) == 0
    begin_of_rest = tl.where(is_padding, 0, begin)
    end_of_rest = tl.where(is_padding, 0, length)
    position_before = _position_before(mask, positions, begin_of_rest, STEP)
    nearest = tl.associative_scan(_load_known(mask, positions, token - 1, inside & (token > begin)), 0, _last_known)
    before = tl.where(nearest == _NONE, position_before, nearest)
    begins = (token == 0) | _is_begin(known, before)
    continues = tl.sum((begins & (token == begin)).to(tl.int32), 0) == 0
    tokens_before = 0
    if continues:
        tokens_before = _masked_tokens_before(mask, positions, begin_of_rest, STEP)
    latest = tl.where(present, known, before)
    is_last = token == tl.minimum(begin + TILE, length) - 1
    is_tail = (length > 1) & (tl.sum((is_last & present & begins).to(tl.int32), 0) > 0)
    position_at_end = tl.max(tl.where(is_last, latest, _NONE), 0)
    tokens_after, is_tail = _masked_tokens_after(
        mask, positions, begin + TILE, end_of_rest, position_at_end, is_tail, STEP
    )

    counted = tl.cumsum(present.to(tl.int32), 0)
    in_tile = tl.sum(present.to(tl.int32), 0)
    # Tokens counted before the sequence began, and those when it ended. Counts grow, so the last is the largest.
    at_begin = tl.associative_scan(tl.where(begins, counted - present.to(tl.int32), -tokens_before), 0, _larger)
    next_known = _load_known(mask, positions, token + 1, (token + 1 < length) & (token - begin < TILE - 1))
    at_end = tl.associative_scan(
        tl.where(_is_begin(next_known, latest), counted, in_tile + tokens_after), 0, _smaller, reverse=True
    )
    if is_tail:
        # Packing collators that give padding a mask of 1 and the position 0. It may follow on padding that the mask tells.
        stop = tl.max(tl.where(inside & ((present & begins) == 0), token, -1), 0)
        if stop < 0:
            follows = _follows_padding(mask, positions, begin, STEP)
        else:
            at_stop = tl.sum((present & (before != _NONE) & (token == stop)).to(tl.int32), 0)
            follows = at_stop == 0
        present = present & ((token <= stop) | follows)
    return at_end - at_begin, present
