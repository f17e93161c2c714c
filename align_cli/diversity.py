"""How different samples are from each other, by their words."""

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 4  # longest n-grams of BLEU
UNMATCHED = 0.1  # counts in the place of no match, so that one order without a match leaves the others a say


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words by all n-grams, over all texts. Li et al. 2016, arXiv 1510.03055.

    It is 1 where none comes twice, and 0 where there is none.
    """
    words = [text.split() for text in texts]
    grams = [tuple(each[place : place + n]) for each in words for place in range(len(each) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[str]) -> list[float]:
    """BLEU-4 of each text against all others: 1 where it is one of them. Zhu et al. 2018, arXiv 1802.01886.

    The n-grams are of words. A text of fewer than four is judged by shorter ones, as sacrebleu does with
    `effective_order`; an order without a match counts 0.1 matches. The work is linear in the words: of each n-gram the
    two largest counts, and whose the first is, tell the largest among the others of any text.

    Args:
        texts: at least two.

    Returns:
        As many numbers, between 0 and 1; small where samples are diverse.
    """
    words = [text.split() for text in texts]
    logs: list[list[float]] = [[] for _ in words]  # log precision of each order
    for size in range(1, ORDER + 1):
        counts = [Counter(tuple(each[i : i + size]) for i in range(len(each) - size + 1)) for each in words]
        for own, matched in enumerate(_matches(counts)):
            if counts[own] and (matched or size > 1):
                logs[own].append(math.log(max(matched, UNMATCHED) / counts[own].total()))
    lengths = Counter(map(len, words))
    return [_score(logs[own], len(each), lengths - Counter([len(each)])) for own, each in enumerate(words)]


def _matches(counts: Sequence[Counter[tuple[str, ...]]]) -> list[int]:
    """How many n-grams of each text are in another one, each as often as in the one that has it most."""
    most: dict[tuple[str, ...], tuple[int, int, int]] = {}  # the largest count, whose it is, and the next
    for own, grams in enumerate(counts):
        for gram, count in grams.items():
            first, holder, second = most.get(gram, (0, -1, 0))
            if count > first:
                most[gram] = (count, own, first)
            elif count > second:
                most[gram] = (first, holder, count)

    def among_others(own: int, gram: tuple[str, ...]) -> int:
        first, holder, second = most[gram]
        return second if holder == own else first

    return [
        sum(min(count, among_others(own, gram)) for gram, count in grams.items()) for own, grams in enumerate(counts)
    ]


def _score(logs: Sequence[float], length: int, others: Counter[int]) -> float:
    """BLEU from the logarithms of its precisions and the lengths of the other texts."""
    if length == 0:
        return float(others[0] > 0)
    if len(logs) < min(ORDER, length):  # not a single word is shared
        return 0.0
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(sum(logs) / len(logs) + min(0.0, 1 - nearest / length))
