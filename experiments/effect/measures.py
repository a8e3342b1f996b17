"""What is measured of an answer: its likeness to the reference, its repetitions, and what it copies from other texts."""

import re
from collections.abc import Hashable, Iterable, Sequence

Tokens = Sequence[Hashable]


def ngrams(tokens: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    """All runs of `n` tokens, in order; none if there are fewer tokens."""
    return list(zip(*(tokens[first:] for first in range(n)), strict=False))


def repeated_share(tokens: Tokens, n: int) -> float:
    """Share of the n-grams that occurred before in the same `tokens`; 0 where there is no n-gram."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def seen_share(answers: Iterable[Tokens], texts: Iterable[Tokens], n: int) -> float:
    """Share of all n-grams of all `answers` that occur verbatim in one of `texts`; 0 where there is no n-gram."""
    grams = [gram for answer in answers for gram in ngrams(answer, n)]
    distinct = set(grams)
    seen = {gram for text in texts for gram in ngrams(text, n) if gram in distinct}
    return sum(gram in seen for gram in grams) / len(grams) if grams else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F-measure of the longest common subsequence of words, lower-case letters and digits."""
    ours, theirs = (re.findall("[a-z0-9]+", text.lower()) for text in (answer, reference))
    if not ours or not theirs:
        return 0.0
    # longest[j]: of the words of `answer` so far and the first j of `reference`
    longest = [0] * (len(theirs) + 1)
    for word in ours:
        before = longest
        longest = [0]
        for j, other in enumerate(theirs):
            longest.append(before[j] + 1 if word == other else max(before[j + 1], longest[j]))
    precision, recall = longest[-1] / len(ours), longest[-1] / len(theirs)
    return 2 * precision * recall / (precision + recall) if longest[-1] else 0.0
