from collections import Counter

import pytest

from align_cli.data.choose import choose
from align_cli.data.options import Keep
from align_cli.data.records import Record


def record(*ratings: float, prompt: str = "p") -> Record:
    return Record(prompt, tuple(f"y{k}" for k in range(len(ratings))), ratings, "here")


def kept(one: Record | None) -> tuple[str, ...]:
    assert one is not None
    return one.responses


def test_everything_is_kept_where_nothing_is_asked() -> None:
    one = record(1, 3, 2)
    assert choose(one, responses=None, keep="random", pairs=None, seed=0) == one
    assert choose(one, responses=3, keep="random", pairs=None, seed=0) == one


def test_the_best_comes_first_and_ratings_stay_with_their_responses() -> None:
    for seed in range(20):
        one = choose(record(1, 3, 2, 3, 0), responses=3, keep="best_and_random", pairs=None, seed=seed)
        assert kept(one)[0] == "y1" and len(kept(one)) == len(set(kept(one))) == 3
        assert one is not None
        assert one.ratings == tuple({"y0": 1, "y1": 3, "y2": 2, "y3": 3, "y4": 0}[y] for y in one.responses)


@pytest.mark.parametrize("keep, possible", [("first", {("y0", "y1")}), ("random", None), ("best_and_random", None)])
def test_keep_says_which_responses_are_kept(keep: Keep, possible: set[tuple[str, ...]] | None) -> None:
    seen = {kept(choose(record(1, 2, 3, 0), responses=2, keep=keep, pairs=None, seed=s)) for s in range(100)}
    pairs = {(f"y{a}", f"y{b}") for a in range(4) for b in range(a + 1, 4)}
    expected = {"random": pairs, "best_and_random": {("y2", "y0"), ("y2", "y1"), ("y2", "y3")}}
    assert seen == (possible or expected[keep])


def test_the_random_one_is_drawn_evenly_from_those_strictly_worse() -> None:
    draws = Counter(
        kept(choose(record(2, 5, 5, 1, prompt=str(n)), responses=None, keep="first", pairs="best_random", seed=0))
        for n in range(2000)
    )
    assert set(draws) == {("y1", "y0"), ("y1", "y3")}
    assert abs(draws["y1", "y0"] - 1000) < 5 * (2000 * 0.25) ** 0.5  # five standard deviations


def test_best_worst_is_the_first_best_and_the_first_worst() -> None:
    assert kept(choose(record(2, 1, 5, 1, 5), responses=None, keep="first", pairs="best_worst", seed=0)) == ("y2", "y1")


def test_all_pairs_keep_every_response() -> None:
    assert kept(choose(record(2, 2, 1), responses=None, keep="first", pairs="all", seed=0)) == ("y0", "y1", "y2")


@pytest.mark.parametrize("pairs", ["best_random", "best_worst", "all"])
def test_ties_have_no_pair(pairs: str) -> None:
    assert choose(record(2, 2, 2), responses=None, keep="first", pairs=pairs, seed=0) is None  # pyright: ignore
    assert choose(record(2), responses=None, keep="first", pairs=pairs, seed=0) is None  # pyright: ignore


def test_pairs_are_taken_from_the_responses_that_are_kept() -> None:
    assert kept(choose(record(1, 2, 9), responses=2, keep="first", pairs="best_worst", seed=0)) == ("y1", "y0")


def test_the_choice_depends_on_content_and_seed_alone() -> None:
    def drawn(seed: int, where: str) -> list[tuple[str, ...]]:
        records = [Record(str(n), ("a", "b", "c", "d"), (0, 1, 2, 3), where) for n in range(30)]
        return [kept(choose(one, responses=2, keep="random", pairs=None, seed=seed)) for one in records]

    assert drawn(1, "here") == drawn(1, "there") != drawn(2, "here")
