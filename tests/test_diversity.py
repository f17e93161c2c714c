"""How different samples are: by hand, against sacrebleu, and where they are all alike."""

import math
import random

import pytest
from sacrebleu.metrics.bleu import BLEU

from align_cli.diversity import distinct, self_bleu


def test_distinct_n_grams_worked_out_by_hand() -> None:
    assert distinct(["a b a", "b"], 1) == 2 / 4
    assert distinct(["a b a", "a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct(["a b"], 3) == 0


def test_self_bleu_worked_out_by_hand() -> None:
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples and 1 of 2 quadruples are in the other text
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx([(4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25] * 2)
    # "a" has a third of the length that it should have; "a b c" has 1 of 3 words, and no pair or triple
    short, long = self_bleu(["a", "a b c"])
    assert short == pytest.approx(math.exp(1 - 3))
    assert long == pytest.approx((1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 3))
    # "a a b" has its second "a" in no other text, however many there are
    assert self_bleu(["a a b", "a", "a"])[0] == pytest.approx((1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 3))
    assert self_bleu(["a b", "c d"]) == [0, 0]


@pytest.mark.parametrize("text", ["a b c d e f", "a b", ""])
def test_texts_that_are_alike_have_a_self_bleu_of_one(text: str) -> None:
    assert self_bleu([text, text, "x y z"])[:2] == pytest.approx([1, 1])


@pytest.mark.parametrize("seed", range(5))
def test_self_bleu_is_sacrebleus(seed: int) -> None:
    generator = random.Random(seed)
    texts = [" ".join(generator.choices("abc", k=generator.randint(1, 9))) for _ in range(7)]
    bleu = BLEU(tokenize="none", effective_order=True, smooth_method="floor", smooth_value=0.1)
    others = [[other for place, other in enumerate(texts) if place != own] for own in range(len(texts))]
    theirs = [bleu.sentence_score(text, rest).score / 100 for text, rest in zip(texts, others, strict=True)]
    assert self_bleu(texts) == pytest.approx(theirs, abs=1e-12)
