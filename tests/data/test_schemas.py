import importlib
import json
import re
from pathlib import Path

import pytest

from align_cli.data import schemas
from align_cli.data.records import Message, Record, Row, RowError

ROWS = Path(__file__).parent / "rows"
README = Path(__file__).parents[2] / "README.md"
REAL = Path(__file__).parents[3] / "shared" / "data"
SKY = (Message(role="user", content="Sky?"),)


def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (ROWS / f"{name}.jsonl").read_text().splitlines()]


def record(row: Row) -> Record:
    return schemas.record(row, "rows.jsonl:7")


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


@pytest.mark.parametrize("name", list(schemas.SCHEMAS))
def test_rows_of_each_schema_are_detected(name: str) -> None:
    assert [schemas.detect(row) for row in rows(name)] == [name] * len(rows(name))


def test_the_rows_that_the_readme_shows_are_read_as_it_says() -> None:
    shown = re.findall(r"^    (\{.*\})$", README.read_text(encoding="utf-8"), re.MULTILINE)
    preference, rated, demonstration, alone = (record(json.loads(line)) for line in shown)
    assert preference.responses == ("4", "5") and preference.ratings[0] > preference.ratings[1]
    assert rated.responses == ("4", "5", "four") and rated.ratings == (1.0, 0.0, 0.8)
    assert demonstration.responses == ("4",) and alone.responses == ()


@pytest.mark.parametrize("name", list(schemas.SCHEMAS))
def test_a_row_keeps_its_label(name: str) -> None:
    assert {record(row).where for row in rows(name)} == {"rows.jsonl:7"}


@pytest.mark.parametrize(
    "name, prompts, ratings",
    [
        ("preference", ["The sky is", (user("Colour of the sky?"),), "Sky: "], [(1, 0)] * 3),
        ("implicit_prompt", [(user("Colour of the sky?"),), "The sky is"], [(1, 0)] * 2),
        ("unpaired", ["The sky is"] * 2, [(1,), (0,)]),
        ("rewards", ["The sky is", SKY], [(1.5, 1, -2), (1, 0)]),
        ("ranks", ["The sky is"], [(-2, -1)]),
        ("completions", ["2 + 2?"] * 2, [(1, 0), (0.75, 0.25, 0)]),
        ("nca", [SKY], [(9, 7.5, 3, 1)]),
        ("nemo", [SKY], [(0, -1)]),
        ("sft", ["2 + 2?", "2 + 3?", (user("2 + 4?"),)], [(1,)] * 3),
        ("prompt", ["The sky is", SKY], [(), ()]),
        ("ultrafeedback", [(user("Name three colours of the rainbow."),), (user("Is 7 a prime number?"),)], None),
    ],
)
def test_prompts_and_ratings_are_those_of_the_row(
    name: str, prompts: list[object], ratings: list[tuple[float, ...]] | None
) -> None:
    records = [record(row) for row in rows(name)]
    assert [one.prompt for one in records] == prompts
    assert ratings is None or [one.ratings for one in records] == ratings


def test_full_texts_lose_the_prompt_that_they_repeat() -> None:
    assert record(rows("preference")[2]).responses == ("blue", "green")


@pytest.mark.parametrize(
    "prompt, one, two",
    [
        ("Hi", "Hi! How are you?", "Hi there."),
        ("Yes", "Yes", "Yes, and"),
        ("Sky: ", "Sky: blue", "Sky: "),
    ],
)
def test_a_response_that_begins_as_the_prompt_does_stays_whole(prompt: str, one: str, two: str) -> None:
    assert record({"prompt": prompt, "chosen": one, "rejected": two}).responses == (one, two)


def test_texts_that_begin_alike_part_at_a_space_which_the_responses_keep() -> None:
    assert record(rows("implicit_prompt")[1]).responses == (" blue.", " black.")


def test_ultrafeedback_is_rated_by_its_overall_score() -> None:
    one = record(rows("ultrafeedback")[0])
    assert one.ratings == (4, 9, 2, 8.5)
    assert one.responses[1] == "Red, green and violet."


def test_ready_made_ultrafeedback_pairs_are_rated_one_and_zero() -> None:
    module = importlib.import_module("align_cli.data.ultrafeedback_h4")
    one = module.record(rows("ultrafeedback_h4")[0], "here")
    assert one == Record((user("Name a fruit."),), ("An apple.", "A carrot."), (1, 0), "here")
    assert record(rows("ultrafeedback_h4")[0]).responses == one.responses


def test_the_prompt_of_ultrainteract_is_the_whole_trajectory() -> None:
    one = record(rows("ultrainteract")[0])
    assert [turn["role"] for turn in one.prompt if not isinstance(turn, str)] == ["user", "assistant", "user"]
    assert one.responses == ("3 * 4 = 12 and 2 + 12 = 14.", "The answer is 20.")


def test_hh_dialogues_part_at_the_first_turn_that_differs() -> None:
    one, two = (record(row) for row in rows("hh"))
    assert one.prompt == (user("How do I boil an egg?"), assistant("Do you have a pot?"), user("Yes."))
    assert one.responses[1] == "I don't know."
    assert two.prompt == (user("Hi"),)
    assert two.responses == ("Hello! What can I do?", "Go away.")


def test_hh_turns_of_one_speaker_are_joined() -> None:
    begun = "\n\nHuman: Hi\n\nHuman: Are you there?\n\nAssistant: "
    assert record({"chosen": begun + "Yes", "rejected": begun + "No"}).prompt == (user("Hi\n\nAre you there?"),)


def test_hh_dialogues_that_do_not_part_are_the_same_response_twice() -> None:
    same = "\n\nHuman: Hi\n\nAssistant: Hello"
    assert record({"chosen": same, "rejected": same}).responses == ("Hello", "Hello")


def test_the_chosen_summary_of_tldr_is_the_one_that_choice_names() -> None:
    one = record(rows("tldr")[0])
    assert one.responses == (" My cat blocks my keyboard.", " Cats are nice.")
    assert isinstance(one.prompt, str)
    assert one.prompt.startswith("SUBREDDIT: r/cats\nTITLE: Cat on keyboard\nPOST: My cat")
    assert one.prompt.endswith("\nTL;DR:")


def test_imdb_reviews_are_cut_behind_their_first_words() -> None:
    imdb = importlib.import_module("align_cli.data.imdb")
    one = imdb.record(rows("imdb")[0], "here")
    assert one.prompt == "I went to see this film with my"
    assert one.responses == (" whole family,\n\nand we all loved every minute.",)
    assert imdb.record(rows("rewards")[0], "here").ratings == (1.5, 1, -2)


def test_alpaca_joins_instruction_and_input_and_keeps_the_history() -> None:
    one, two = (record(row) for row in rows("alpaca"))
    assert one.prompt == (user("Translate to French.\ncat"),)
    assert one.responses == ("chat",)
    system = Message(role="system", content="Be brief.")
    assert two.prompt == (system, user("Hello"), assistant("Hello!"), user("Translate to French.\ndog"))
    assert two.responses == ("chien", "chat")


def test_sharegpt_imitates_the_last_turn_or_compares_two() -> None:
    one, two = (record(row) for row in rows("sharegpt"))
    assert one.responses == ("Blue.",) and len(one.prompt) == 4
    assert two.responses == ("Blue.", "Green.") and two.prompt == SKY


BAD = [
    ({"prompt": "a", "completions": ["b", "c"], "rewards": [1]}, "2 completions but 1 rewards"),
    ({"prompt": "a", "completions": ["b", "c"], "rewards": [1, float("nan")]}, r"rewards\[1\] is nan"),
    ({"prompt": "a", "completions": ["b"], "rewards": [float("inf")]}, r"rewards\[0\] is inf"),
    ({"prompt": "a", "completions": ["b"], "rewards": [None]}, r"rewards\[0\] is missing"),
    ({"prompt": "a", "completions": ["b"], "rewards": ["1"]}, r"rewards\[0\] is str '1' where a number"),
    ({"prompt": "a", "completions": ["b", "c"]}, "neither 'rewards' nor 'ranks'"),
    ({"prompt": "a", "completions": [], "rewards": []}, "there are no responses"),
    ({"prompt": "a", "completions": "bc", "rewards": [1, 2]}, "completions is str 'bc' where a list"),
    ({"prompt": "a", "completions": [{"response": "b"}]}, r"completions\[0\] has none of reward, score"),
    ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "response 1 of 2 is empty"),
    ({"prompt": " ", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
    ({"prompt": [], "chosen": "b", "rejected": "c"}, "the prompt is empty"),
    ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen is int '3' where a text"),
    ({"prompt": "a", "chosen": "b \ud800", "rejected": "c"}, "half a character"),
    ({"prompt": [assistant("a")], "chosen": "b", "rejected": "c"}, "the prompt is empty: no user"),
    ({"prompt": [user("a"), assistant("b")], "chosen": "b", "rejected": "c"}, "ends with a turn of the assistant"),
    (
        {"prompt": [user("a")], "chosen": [user("x"), assistant("b")], "rejected": [user("x"), assistant("c")]},
        "the prompt is not a prefix of chosen and rejected",
    ),
    (
        {"prompt": "a", "chosen": [user("x"), assistant("b")], "rejected": [user("x"), assistant("c")]},
        "the prompt is not a prefix of chosen and rejected",
    ),
    ({"chosen": [user("x"), assistant("b")], "rejected": [user("y"), assistant("c")]}, "no prompt is a prefix of both"),
    ({"chosen": [user("x")], "rejected": [user("x")]}, "have to end with a turn of the assistant"),
    ({"chosen": "one", "rejected": "two"}, "do not begin alike"),
    ({"chosen": [{"role": "tool", "content": "x"}], "rejected": []}, "said by 'tool'"),
    ({"prompt": "a", "completion": "b", "label": None}, "label is missing"),
    (
        {"title": "a", "body": "b"},
        r"no known schema has the keys title, body\. Known: nca .*preference \(prompt",
    ),
    ({}, r"no known schema has the keys \(none\)"),
    ({"prompt": "a", "chosen": "b"}, "no known schema has the keys prompt, chosen"),
    ({"prompt": " "}, "the prompt is empty"),
    ({"prompt": [user("x"), assistant("b")]}, "the prompt ends with a turn of the assistant"),
    ({"instruction": "a", "completions": [{"response": "b"}]}, r"completions\[0\]\.overall_score is missing"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "has to end with a turn of the assistant"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"}, "the beginning of the other"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "part before a turn"),
    ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"}}, "no 'rejected'"),
    ({"instruction": "a", "output": "b", "history": [["one"]]}, r"history\[0\] has 1 texts where a user's and an"),
    ({"prompt": "a", "completions": ["b"], "rewards": [10**400]}, r"rewards\[0\] is inf"),
]


@pytest.mark.parametrize("row, reason", BAD)
def test_a_bad_row_gives_its_reason(row: Row, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        record(row)


@pytest.mark.parametrize(
    "name, row, reason",
    [
        ("nca", {"score_A0": 1}, "no 'A0': the keys are score_A0"),
        ("sft", {"question": "a", "answer": None}, "no 'answer': the keys are question, answer"),
        ("sft", {}, "no 'answer'"),
    ],
)
def test_a_row_of_another_schema_than_the_one_that_is_named_gives_its_reason(name: str, row: Row, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        schemas.SCHEMAS[name].record(row, "here")


@pytest.mark.parametrize(
    "name, schema, records, bad",
    [
        ("alpacaeval_gpt4_rewards", "completions", 805, []),
        ("gsm8k_model_solutions", "completions", 1319, []),
        ("gsm8k_train_2000", "sft", 2000, []),
        ("hh_harmless_test", "hh", 299, [87]),  # line 87 is chosen for saying nothing
    ],
)
def test_every_row_of_real_files_becomes_a_record_or_a_reason(
    name: str, schema: str, records: int, bad: list[int]
) -> None:
    path = REAL / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip("the folder of real data is not beside the checkout")
    good, refused = 0, []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        row = json.loads(line)
        assert schemas.detect(row) == schema
        try:
            assert len(record(row).responses) == {"completions": 4, "hh": 2, "sft": 1}[schema]
        except RowError:
            refused.append(number)
            continue
        good += 1
    assert (good, refused) == (records, bad)
