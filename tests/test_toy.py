import itertools
import random

import pytest

from align_cli.data import toy


def all_of(digits: int) -> list[str]:
    return list(toy.problems(0, digits))


def test_problems_are_all_there_once():
    prompts = all_of(1)
    assert sorted(prompts) == sorted(f"{a}+{b}=" for a in range(1, 10) for b in range(1, 10))
    assert len(set(itertools.islice(toy.problems(3, 2), 500))) == 500


def test_problems_are_fixed_by_the_seed():
    first, again, other = (list(itertools.islice(toy.problems(seed, 2), 50)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_written_out_example():
    assert toy.steps("47+85=", carry=True) == (["7+5=12", "4+8+1=13"], 132)
    assert toy.steps("47+85=", carry=False) == (["7+5=12", "4+8=12"], 122)
    assert toy.demonstrate("47+85=", "steps", random.Random(0)) == "7+5=12 4+8+1=13 #132"
    assert toy.demonstrate("47+85=", "carry_dropped", random.Random(0)) == "7+5=12 4+8=12 #122"


def test_steps_lead_to_the_sum_for_every_problem():
    for prompt in all_of(2):
        a, b = toy.summands(prompt)
        assert toy.steps(prompt, carry=True)[1] == a + b
    for prompt in itertools.islice(toy.problems(0, 5), 200):
        assert toy.steps(prompt, carry=True)[1] == sum(toy.summands(prompt))


def test_dropping_the_carry_is_wrong_exactly_where_there_is_one():
    for prompt in all_of(2):
        a, b = toy.summands(prompt)
        carries = a % 10 + b % 10 >= 10
        assert toy.correct(prompt, toy.demonstrate(prompt, "carry_dropped", random.Random(0))) == (not carries)


def test_the_mixture_sums_to_one_and_is_what_is_drawn():
    assert sum(toy.MIXTURE.values()) == pytest.approx(1)
    rng = random.Random(0)
    drawn = [toy.behaviour(rng) for _ in range(4000)]
    for name, weight in toy.MIXTURE.items():
        # four standard deviations of a binomial count
        assert abs(drawn.count(name) - 4000 * weight) < 4 * (4000 * weight * (1 - weight)) ** 0.5


def test_behaviours_are_graded_in_this_order():
    rng = random.Random(1)
    prompts = list(itertools.islice(toy.problems(5, 2), 1500))
    means = {
        name: sum(toy.score(prompt, toy.demonstrate(prompt, name, rng)) for prompt in prompts) / len(prompts)
        for name in toy.MIXTURE
    }
    assert means["steps"] == 1
    assert means["steps"] > means["carry_dropped"] > means["guess"]
    assert means["guess"] == pytest.approx(means["ramble"], abs=0.05)


def test_guesses_are_right_as_often_as_they_claim():
    rng = random.Random(2)
    prompts = list(itertools.islice(toy.problems(6, 2), 2000))
    right = sum(toy.correct(prompt, toy.guess(prompt, rng)) for prompt in prompts)
    assert abs(right - 2000 * toy.GUESS_RIGHT) < 4 * (2000 * toy.GUESS_RIGHT * (1 - toy.GUESS_RIGHT)) ** 0.5


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("7+5=12 4+8+1=13 #132", 1.0),
        ("7+5=12 4+8+1=13", 0.4),  # right steps, no answer
        ("7+5=12 4+8=12 #122", 0.3 * 2 / 3 + 0.4 / 2),  # two digits of three, one step of two
        ("#132", 0.6),
        ("#130", 0.3 * 2 / 3),
        ("hmm, maybe #132", 0.6),
        ("hmm 7+5=12 4+8+1=13 #132", 0.6),  # steps count from the first character on
        ("#132132", 0.3 * 3 / 6),
        ("132", 0.0),
        ("", 0.0),
        ("#", 0.0),
    ],
)
def test_score_of_a_response(response: str, reward: float):
    assert toy.score("47+85=", response) == pytest.approx(reward, abs=1e-6)


def test_only_the_right_answer_is_correct():
    assert toy.correct("47+85=", "#132")
    assert toy.correct("47+85=", "#1 #132")
    assert not toy.correct("47+85=", "132")
    assert not toy.correct("47+85=", "#132 ")
    assert not toy.correct("47+85=", "#132 #1")


def test_everything_is_written_in_the_alphabet():
    rng = random.Random(0)
    for prompt in itertools.islice(toy.problems(0, 3), 300):
        for name in toy.MIXTURE:
            assert set(prompt + toy.demonstrate(prompt, name, rng)) <= set(toy.ALPHABET)
    assert len(set(toy.ALPHABET)) == len(toy.ALPHABET)


def test_what_is_no_addition_is_refused():
    with pytest.raises(ValueError, match="no addition"):
        toy.score("47-85=", "#1")
