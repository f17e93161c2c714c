import importlib
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from align_cli.data import schemas
from align_cli.data.options import Data, Format
from align_cli.data.shelf import KEY, Growing, ranked
from align_cli.data.show import show
from align_cli.data.store import Store, alone, code, converter, prepare
from align_cli.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"
REAL = Path(__file__).parents[3] / "shared" / "data"
DATA = Data(
    name="file",
    path=None,
    revision=None,
    subset=None,
    split="train",
    held_out_split=None,
    format="auto",
    responses=None,
    keep="best_and_random",
    pairs=None,
    template="auto",
    system=None,
    max_length=1000,
    max_prompt_length=None,
    truncation="drop",
    bad_rows=0,
    held_out=0,
    limit=None,
    expected=None,
)
TEXTS = [" sat.", " ate the rat", " is"]
GOOD = [
    {"prompt": f"the cat {n}", "completions": TEXTS[: 2 + n % 2], "rewards": [n, 1, 0][: 2 + n % 2]}
    for n in range(2, 12)
]


def written(folder: Path, rows: Sequence[Mapping[str, object] | str]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def made(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, object] | str] = GOOD,
    *,
    pairwise: bool = False,
    strict: bool = False,
    sampled: int | None = None,
    told: list[str] | None = None,
    **options: object,
) -> tuple[Store, Store]:
    data = replace(DATA, **{"path": str(written(folder, rows)), **options})  # pyright: ignore[reportArgumentType]
    say = (told if told is not None else []).append
    cache = folder / "cache"
    return prepare(data, tokenizer, seed=0, cache=cache, say=say, pairwise=pairwise, strict=strict, sampled=sampled)


def test_a_store_gives_back_what_was_tokenised(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    store, held_out = made(tmp_path, words)
    assert (len(store), len(held_out)) == (10, 0)
    for group, row in zip(store, GOOD, strict=True):
        assert words.decode(group.prompt) == f"<s>{row['prompt']}"
        assert [words.decode(ids) for ids in group.responses] == [f"{text}</s>" for text in row["completions"]]
        assert group.ratings.tolist() == row["rewards"]
        assert group.prompt.dtype == np.int32 and group.ratings.dtype == np.float32
    assert store[3].where.endswith("rows.jsonl:4") and store[3].index == 3
    with pytest.raises(IndexError):
        store[10]


def test_lengths_are_those_of_the_groups(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    for store in made(tmp_path, words, held_out=3):
        assert store.responses.tolist() == [len(group.responses) for group in store]
        assert store.prompt_tokens.tolist() == [len(group.prompt) for group in store]
        assert store.response_tokens.tolist() == [sum(map(len, group.responses)) for group in store]


def test_prompts_number_the_distinct_prompts_as_they_first_appear(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    rows = [*GOOD[:4], *GOOD[2:6], GOOD[0]]
    train, _ = made(tmp_path, words, rows)
    assert train.prompts.tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 0]
    for store in made(tmp_path, words, rows, held_out=2):
        seen: list[list[int]] = []
        for group, number in zip(store, store.prompts.tolist(), strict=True):
            if number == len(seen):
                seen.append(group.prompt.tolist())
            assert seen[number] == group.prompt.tolist()
        assert len({tuple(prompt) for prompt in seen}) == len(seen) == store.prompts.max() + 1


def test_prompts_that_are_one_after_truncation_have_one_number(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    rows = [{**row, "prompt": f"{row['prompt']} and the rat sat on the mat."} for row in GOOD]
    store, _ = made(tmp_path, words, rows, truncation="truncate_prompt_left", max_prompt_length=4)
    assert set(store.prompts.tolist()) == {0}


def test_the_largest_token_is_known_without_reading_the_tokens(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    for store in made(tmp_path, words, held_out=3):
        assert store.largest == store.tokens.max() > 0


@pytest.mark.parametrize("seed", range(3))
def test_keys_are_ranked_as_bytes_are(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    keys = [bytes(key) for key in draw.integers(0, 3, (200, KEY), dtype=np.uint8) * np.uint8(127)]
    keys += draw.permutation([key[:8] + bytes(8) for key in keys[:50]] + keys[:50]).tolist()
    keys = [key.ljust(KEY, b"\0") for key in keys]
    file = Growing(tmp_path / "keys.npy", np.uint8)
    file.extend(np.frombuffer(b"".join(keys), dtype=np.uint8))
    file.finish(kept=True)
    file.file.close()
    distinct = sorted(set(keys))
    assert ranked(file.path).tolist() == [distinct.index(key) for key in keys]


def test_the_files_are_ordinary_numpy_arrays(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    store, _ = made(tmp_path, words)
    tokens = np.load(store.path.parent / "tokens.npy")
    assert tokens.dtype == np.int32
    assert tokens.size == store.prompt_tokens.sum() + store.response_tokens.sum()


def test_a_store_is_made_once_and_again_when_anything_that_decides_it_changes(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    told: list[str] = []
    first, _ = made(tmp_path, words, told=told)
    again, _ = made(tmp_path, words, told=told)
    assert sum(line.startswith("reading") for line in told) == 1 and first.path == again.path
    paths = {
        first.path,
        made(tmp_path, words, GOOD[:9])[0].path,
        made(tmp_path, words, responses=2)[0].path,
        made(tmp_path, words, pairwise=True, responses=2)[0].path,
    }
    words.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    paths.add(made(tmp_path, words)[0].path)
    assert len(paths) == 5
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_store_is_made_again_when_a_plugin_s_helper_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mine_to_clean"
    (package / "data").mkdir(parents=True)
    for file in (package / "__init__.py", package / "data" / "__init__.py", package / "clean.py"):
        file.touch()
    (package / "data" / "chats.py").write_text("from mine_to_clean import clean\ndef record(row, where): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    convert = importlib.import_module("mine_to_clean.data.chats").record
    before = code(convert)
    assert code(convert) == before
    (package / "clean.py").write_text("# mended")
    assert code(convert) != before


PREPARE = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from tests.data.test_store import DATA, replace
from align_cli.data import store

folder = Path(sys.argv[1])
build = store.build

def slowly(*given):
    (folder / "begun").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    print("built", flush=True)
    if sys.argv[2] == "dies":
        import os
        os._exit(9)
    build(*given)

store.build = slowly
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
data = replace(DATA, path=str(folder / "rows.jsonl"))
told = lambda line: print(line, flush=True)
store.prepare(data, tokenizer, seed=0, cache=folder / "cache", say=told, pairwise=False, strict=False, sampled=None)
"""


def preparing(folder: Path, ending: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(folder), ending], stdout=subprocess.PIPE, text=True, cwd=CONF.parents[1]
    )


@pytest.mark.parametrize("ending", ["lives", "dies"])
def test_of_two_that_prepare_one_dataset_the_second_waits(
    tmp_path: Path, words: PreTrainedTokenizerBase, ending: str
) -> None:
    words.save_pretrained(tmp_path / "tokenizer")
    written(tmp_path, GOOD)
    with preparing(tmp_path, ending) as first:
        while not (tmp_path / "begun").exists():
            assert first.poll() is None
            time.sleep(0.01)
        with preparing(tmp_path, "lives") as second:
            assert second.stdout is not None
            waits = second.stdout.readline()
            (tmp_path / "go").touch()
            rest, _ = second.communicate()
        told, _ = first.communicate()
    assert re.search(r"another process is reading .*rows\.jsonl: waiting", waits)
    assert (first.returncode, second.returncode) == (0 if ending == "lives" else 9, 0)
    assert "built" in told and ("built" in rest) == (ending == "dies")
    assert "10 rows: 10 to train on" in rest
    [made_once] = (tmp_path / "cache").iterdir()
    assert (made_once / "train").is_dir()


def test_a_lock_is_never_held_twice(tmp_path: Path) -> None:
    """Also not by one who waited for a file that its holder has removed, which the next one makes anew."""
    inside, most = [0], [0]

    def hold() -> None:
        for _ in range(5):
            with alone(tmp_path / "lock", lambda: None):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and list(tmp_path.iterdir()) == []


def test_the_digest_is_of_the_content(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    first, _ = made(tmp_path, words)
    assert made(tmp_path, words, bad_rows=3)[0].digest == first.digest
    assert made(tmp_path, words, GOOD[::-1])[0].digest != first.digest


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError):
        made(tmp_path, words, [*GOOD, "{"])
    assert list((tmp_path / "cache").iterdir()) == []


def test_more_bad_rows_than_allowed_stop_with_file_line_and_reason(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    rows = [GOOD[0], "{", GOOD[1], {"prompt": "a", "completions": ["b"], "rewards": [float("nan")]}]
    with pytest.raises(UserError, match=r"rows\.jsonl:2: not JSON: .*data\.bad_rows=0 malformed rows may be skipped"):
        made(tmp_path, words, rows)
    with pytest.raises(UserError, match=r"rows\.jsonl:4: rewards\[0\] is nan.*data\.bad_rows=1 .*, 1 were"):
        made(tmp_path, words, rows, bad_rows=1)
    told: list[str] = []
    store, _ = made(tmp_path, words, rows, bad_rows=2, told=told)
    assert (len(store), store.report["rows"], store.report["malformed"]) == (2, 4, 2)
    assert "4 rows: 2 to train on, 0 held out, 2 malformed" in told[-1] and "rows.jsonl:2: not JSON" in told[-1]


def test_no_row_is_lost_silently(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    rows = [
        *GOOD,
        "[]",
        {"prompt": "tie", "completions": ["a", "b"], "rewards": [1, 1]},
        {"prompt": "same", "completions": ["a", "a"], "rewards": [1, 0]},
        {"prompt": "long " * 99, "completions": ["a", "b"], "rewards": [1, 0]},
    ]
    store, held_out = made(
        tmp_path, words, rows, pairwise=True, pairs="best_worst", bad_rows=9, max_length=60, held_out=2
    )
    report = store.report
    counts = {name: report[name] for name in ("rows", "malformed", "without_preference", "too_long", "duplicates")}
    assert counts == {"rows": 14, "malformed": 1, "without_preference": 2, "too_long": 1, "duplicates": 1}
    assert (len(store), len(held_out)) == (report["train"], report["held_out"]) == (8, 2)


def test_what_a_question_led_to_is_held_out_with_it(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    """As in a tree of attempts, whose later rows have the earlier ones in their prompts."""

    def row(question: str, *turns: str) -> dict[str, object]:
        asked = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant") * 2, (question, *turns), strict=False)
        ]
        return {"prompt": asked, "completions": ["a", "b"], "rewards": [1, 0]}

    rows = [each for n in range(12) for each in (row(f"{n}?"), row(f"{n}?", "no", "again"))]
    train, held_out = made(tmp_path, words, rows, held_out=5, template="text")
    assert (len(train), len(held_out)) == (14, 10)


def test_where_responses_are_sampled_those_of_the_rows_drop_no_prompt(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    rows = [
        {"prompt": "tie", "completions": ["a", "b"], "rewards": [1, 1]},
        {"prompt": "same", "completions": ["a", "a"], "rewards": [1, 0]},
        {"prompt": "wordy", "completions": ["a " * 99, "b"], "rewards": [1, 0]},
        {"prompt": "many", "completions": ["a", "b", "c"], "rewards": [2, 1, 0]},
        {"prompt": "alone"},
        {"prompt": "empty", "completions": ["", "b"], "rewards": [1, 0]},
        {"prompt": "unrated", "completions": ["a", "b"], "rewards": [1, None]},
    ]
    store, _ = made(tmp_path, words, rows, pairwise=True, sampled=10, max_length=40)
    assert [words.decode(group.prompt) for group in store] == [f"<s>{row['prompt']}" for row in rows]
    assert {len(group.responses) for group in store} == {len(group.ratings) for group in store} == {0}
    assert store.report["too_long"] == store.report["without_preference"] == store.report["duplicates"] == 0
    assert store.longest.tolist() == store.prompt_tokens.tolist()


def test_a_prompt_leaves_room_for_the_longest_response_that_may_be_sampled(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    rows = [{"prompt": "a b c"}, {"prompt": "a b c d"}]
    (length, _) = made(tmp_path, words, rows, sampled=1)[0].prompt_tokens.tolist()
    store, _ = made(tmp_path, words, rows, sampled=10, max_length=length + 10)
    assert len(store) == 1 and store.report["too_long"] == 1
    store, _ = made(tmp_path, words, rows, sampled=10, max_length=length + 10, truncation="truncate_prompt_left")
    assert store.prompt_tokens.tolist() == [length, length]
    with pytest.raises(UserError, match=r"too long: the shortest has \d+ tokens, data\.max_length="):
        made(tmp_path, words, rows, sampled=10, max_length=length + 9)


def test_a_prompt_alone_teaches_nothing_where_responses_are_not_sampled(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    rows = [*GOOD, {"prompt": "alone"}]
    with pytest.raises(UserError, match=r"rows\.jsonl:11: a prompt alone, .*; source=rollout samples responses"):
        made(tmp_path, words, rows)
    store, _ = made(tmp_path, words, rows, bad_rows=1)
    assert (len(store), store.report["malformed"]) == (10, 1)


def test_the_schema_is_said_aloud_and_can_be_overridden(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    told: list[str] = []
    store, _ = made(tmp_path, words, told=told)
    assert any("the schema rewards: prompt, completions, rewards (data.format overrides)" in line for line in told)
    assert store.report["schema"] == "rewards (10)"
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "d", "label": 1}
    store, _ = made(tmp_path, words, [row], format="unpaired")
    assert store.report["schema"] == "unpaired" and words.decode(store[0].responses[0]) == "d</s>"


@pytest.mark.parametrize("rows", [[], ["", ""]])
def test_an_empty_dataset_is_refused(tmp_path: Path, words: PreTrainedTokenizerBase, rows: list[str]) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl holds no rows"):
        made(tmp_path, words, rows)


def test_a_dataset_of_bad_rows_only_is_refused(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"all 2 rows of .* are malformed; the first: .*rows\.jsonl:1: a JSON list"):
        made(tmp_path, words, ["[]", "[]"], bad_rows=5)


def test_a_missing_path_names_the_key(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"data\.path is not set"):
        prepare(DATA, words, seed=0, cache=tmp_path, say=print, pairwise=False, strict=False, sampled=None)


def test_rows_that_are_all_too_long_name_the_shortest_and_the_key(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    whole, _ = made(tmp_path, words)
    longest = [len(group.prompt) + max(map(len, group.responses)) for group in whole]
    with pytest.raises(UserError, match=rf"too long: the shortest has {min(longest)} tokens, data\.max_length=5"):
        made(tmp_path, words, max_length=5)
    store, _ = made(tmp_path, words, max_length=min(longest))
    assert len(store) == longest.count(min(longest))


def test_truncation_cuts_prompts_from_the_left_and_never_a_response(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    whole, _ = made(tmp_path, words)
    longest = max(max(map(len, group.responses)) for group in whole)
    store, _ = made(tmp_path, words, truncation="truncate_prompt_left", max_length=longest + 5)
    assert len(store) == 10 and store.report["prompts_truncated"] == int((whole.prompt_tokens > 5).sum()) > 0
    for short, full in zip(store, whole, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(short.responses, full.responses, strict=True))
        kept = len(short.prompt) - 1
        assert short.prompt[0] == full.prompt[0] and np.array_equal(short.prompt[1:], full.prompt[-kept:])
        assert len(short.prompt) + max(map(len, short.responses)) <= longest + 5
    store, _ = made(tmp_path, words, truncation="truncate_prompt_left", max_prompt_length=4)
    assert store.prompt_tokens.max() == 4


def test_truncation_error_names_the_row_and_its_length(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: a prompt of \d+ tokens and a response of \d+.*max_length=4"):
        made(tmp_path, words, truncation="error", max_length=4)


def test_an_algorithm_that_compares_two_needs_a_choice_of_pairs(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:2: 3 responses for an algorithm that compares two.*data\.pairs"):
        made(tmp_path, words, pairwise=True)
    pairs, _ = made(tmp_path, words, pairwise=True, pairs="best_random")
    assert set(pairs.responses.tolist()) == {2}
    everything, _ = made(tmp_path, words, pairwise=True, pairs="all")
    assert set(everything.responses.tolist()) == {2, 3}


def test_data_without_any_preference_is_refused_for_pairs(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="prefers one response to another"):
        made(tmp_path, words, [{"question": "a", "answer": "b"}], pairwise=True)


def test_labels_of_the_best_response_drop_what_is_rated_alike_and_pair_nothing(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    rows = [
        {"prompt": f"the {name}", "completions": ["a", "b", "c"], "rewards": rewards}
        for name, rewards in (("cat", [1, 1, 1]), ("dog", [2, 2, 1]), ("end", [1, 2, 3]))
    ]
    store, _ = made(tmp_path, words, rows, strict=True)
    assert store.responses.tolist() == [3, 3] and store.report["without_preference"] == 1
    few, _ = made(tmp_path, words, rows, strict=True, responses=2, keep="first")
    assert few.responses.tolist() == [2] and few.report["without_preference"] == 2
    assert len(made(tmp_path, words, rows)[0]) == 3


def prompts(store: Store, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {str(tokenizer.decode(group.prompt)) for group in store}


def test_the_same_prompt_is_never_on_both_sides(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    train, held_out = made(tmp_path, words, [*GOOD, *GOOD], held_out=4)
    assert (len(train), len(held_out)) == (12, 8)
    assert not prompts(train, words) & prompts(held_out, words)
    assert len(prompts(held_out, words)) == 4


def test_what_is_held_out_does_not_depend_on_order_and_stays_out_of_parts(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    _, held_out = made(tmp_path, words, held_out=4)
    _, backwards = made(tmp_path, words, GOOD[::-1], held_out=4)
    assert prompts(held_out, words) == prompts(backwards, words)
    train, _ = made(tmp_path, words, held_out=4, limit=8)
    assert train.report["rows"] == 8 and not prompts(train, words) & prompts(held_out, words)


def test_half_of_a_small_dataset_stays_for_training(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    told: list[str] = []
    train, held_out = made(tmp_path, words, held_out=64, told=told)
    assert (len(train), len(held_out)) == (5, 5)
    assert "10 prompts: 5 are held out, not data.held_out=64" in told


def test_a_held_out_split_loses_the_prompts_that_are_trained_on(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    written(tmp_path, GOOD[:7]).rename(tmp_path / "train.jsonl")
    written(tmp_path, GOOD[5:]).rename(tmp_path / "test.jsonl")
    data = replace(DATA, path=str(tmp_path), held_out_split="test", held_out=2)
    train, held_out = prepare(
        data, words, seed=0, cache=tmp_path / "cache", say=print, pairwise=False, strict=False, sampled=None
    )
    assert (len(train), len(held_out), train.report["held_out_but_trained_on"]) == (7, 2, 2)
    assert not prompts(train, words) & prompts(held_out, words)


def test_a_held_out_split_that_is_not_there_is_named_by_its_key(tmp_path: Path, words: PreTrainedTokenizerBase) -> None:
    written(tmp_path, GOOD[:7]).rename(tmp_path / "train.jsonl")
    data = replace(DATA, path=str(tmp_path), held_out_split="test", held_out=2)
    with pytest.raises(UserError, match=r"for the split 'test' \(data\.held_out_split; null takes data\.held_out"):
        prepare(data, words, seed=0, cache=tmp_path / "cache", say=print, pairwise=False, strict=False, sampled=None)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_yaml_gives_every_key_of_the_section_and_a_dataset_that_exists(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    data = TypeAdapter(Data).validate_python(given)
    assert set(given) == set(Data.__dataclass_fields__)
    assert converter(data)


def test_the_formats_are_the_schemas() -> None:
    assert Format.__args__ == ("auto", *Format.__args__[1:])
    assert set(Format.__args__) == {"auto", *schemas.SCHEMAS}


@pytest.mark.parametrize(
    "name, options, train, counts",
    [
        ("alpacaeval_gpt4_rewards", {}, 805, {"malformed": 0, "duplicates": 19}),
        ("gsm8k_model_solutions", {"pairs": "best_random", "pairwise": True}, 731, {"without_preference": 588}),
        ("hh_harmless_test", {"bad_rows": 1, "pairwise": True}, 299, {"malformed": 1}),
    ],
)
def test_real_files_become_stores(
    tmp_path: Path,
    mistral: PreTrainedTokenizerBase,
    name: str,
    options: dict[str, object],
    train: int,
    counts: dict[str, int],
) -> None:
    path = REAL / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip("the folder of real data is not beside the checkout")
    store, _ = made(tmp_path, mistral, path=str(path), max_length=10_000, template="text", **options)  # pyright: ignore
    assert len(store) == train
    assert {count: store.report[count] for count in counts} == counts
    assert sum(int(store.report[part]) for part in ("malformed", "without_preference", "train")) == store.report["rows"]
    stop = mistral.eos_token_id
    assert all(ids[-1] == stop and stop not in ids[:-1] for group in store for ids in group.responses)


def test_an_example_is_shown_with_its_special_tokens_ratings_and_lengths(
    tmp_path: Path, words: PreTrainedTokenizerBase
) -> None:
    store, _ = made(tmp_path, words, [{"prompt": "the cat\x1b[31m", "completions": [" sat."], "rewards": [2.5]}])
    plain, coloured = io.StringIO(), io.StringIO()
    show(store, words, 0, Console(file=plain, width=200))
    show(store, words, 0, Console(file=coloured, width=200, force_terminal=True, color_system="truecolor"))
    shown = plain.getvalue()
    assert "<s>the cat\\x1b[31m\n" in shown and " sat.</s>\n" in shown and "rating 2.5" in shown
    assert f"prompt, {len(store[0].prompt)} tokens, not trained on" in shown
    assert f"ids {' '.join(map(str, store[0].responses[0].tolist()))}\n" in shown
    assert "\x1b" not in shown and "\x1b[32m sat." in coloured.getvalue()
    with pytest.raises(UserError, match="index=1: the data has prompts 0 to 0"):
        show(store, words, 1, Console(file=plain))
