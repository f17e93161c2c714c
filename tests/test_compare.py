"""`align compare`: which runs are one group, what a group is called, and what is said of the difference."""

import functools
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import align

from align_cli import comparison, config, exits, results, rundir
from align_cli.commands.completion import complete
from align_cli.config import Tree
from align_cli.evals import Item, Result

REWARD = "eval/after/reward"
T_1, T_2 = math.tan(0.475 * math.pi), 0.95 * math.sqrt(2 / (1 - 0.95**2))  # 97.5 % quantiles of Student's t
CONTRASTIVE = ("algo=ppo", "reward=contrastive")


@functools.cache
def composed(*overrides: str) -> Tree:
    return config.compose("train", overrides)


def write(run: Path, seed: int, figures: Mapping[str, Any] | None, *overrides: str) -> Path:
    """A run directory as `align train` leaves it; without figures, as it does where it has not finished."""
    run.mkdir(parents=True)
    tree = composed(*overrides)
    rundir.write_config(run, {**tree, "run": {"dir": str(run), "seed": seed}})
    if figures is not None:
        rundir.write_summary(run, figures)
    return run


def seeds(home: Path, name: str, values: Mapping[int, float], *overrides: str) -> None:
    for seed, value in values.items():
        write(home / f"{name}-{seed}", seed, {"steps": 46, REWARD: value}, *overrides)


def compared(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert align("compare", *words, "--json") == exits.DONE
    return json.loads(capsys.readouterr().out)


# --- groups and their labels


def test_runs_of_a_group_differ_in_nothing_that_is_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ways = ("track=none", "launch.devices=2", "resume=never", "checkpoint.every=7", "eval.every=5")
    for seed, way in enumerate((*ways, "engine.micro_tokens=512")):
        write(tmp_path / f"nca-{seed}", seed, {REWARD: 0.5}, way)
    seeds(tmp_path, "sharper", {0: 0.5, 1: 0.25}, "algo.beta=0.05")
    groups = compared(capsys, str(tmp_path))["groups"]
    assert [sorted(group) for group in groups.values()] == [list("012345"), list("01")]


@pytest.mark.parametrize(
    ("changes", "labels", "in_step"),
    [
        ([["algo=dpo"], ["algo=nca"]], ["algo=dpo", "algo=nca"], {}),
        (
            [["algo=nca", "algo.beta=0.1"], ["algo=nca", "algo.beta=0.2"], ["algo=dpo"]],
            ["algo=nca algo.beta=0.1", "algo=nca algo.beta=0.2", "algo=dpo"],
            {},
        ),
        (
            [["algo=ppo"], list(CONTRASTIVE), ["algo=rloo"], ["algo=grpo"]],
            [
                "algo=ppo reward=given",
                "algo=ppo reward=contrastive",
                "algo=rloo reward=given",
                "algo=grpo reward=given",
            ],
            {"advantage": ["gae", "gae", "leave_one_out", "group"], "kl": ["fixed", "fixed", "fixed", "null"]},
        ),
        (
            [["algo=dpo", "train.lr=1e-6"], ["algo=ipo", "train.lr=2e-6"]],
            ["algo=dpo", "algo=ipo"],
            {"train.lr": ["1e-06", "2e-06"]},
        ),
        (
            [["algo=fdpg", "divergence=js"], ["algo=fdpg", "divergence=tv"], ["algo=ppo"]],
            ["algo=fdpg divergence=js", "algo=fdpg divergence=tv", "algo=ppo"],
            None,
        ),
        (
            [["optimizer.betas=[0.9,0.999]"], ["optimizer.betas=[0.9,0.95]"]],
            ["optimizer.betas=[0.9,0.999]", "optimizer.betas=[0.9,0.95]"],
            {},
        ),
        ([["train.steps=20"], []], ["train.steps=20", "train.steps=null"], {}),
    ],
)
def test_a_label_has_the_fewest_settings_that_tell_groups_apart(
    changes: list[list[str]],
    labels: list[str],
    in_step: dict[str, list[str]] | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What differs in step with the labels is told beside them: a learning rate may be the reason as well."""
    for number, overrides in enumerate(changes):
        write(tmp_path / str(number), 0, {REWARD: 0.5}, *overrides)
    found = compared(capsys, str(tmp_path))
    assert list(found["groups"]) == labels
    assert in_step is None or found["differ_together"] == in_step


SETTINGS = st.fixed_dictionaries(
    {},
    optional={key: st.sampled_from("12") for key in ("algo.name", "algo.a", "kl.name", "kl.a", "kl.b", "train.lr")},
)


@settings(deadline=None)
@given(st.lists(SETTINGS, min_size=2, max_size=7, unique_by=lambda settings: tuple(sorted(settings.items()))))
def test_no_two_groups_have_one_label(groups: list[dict[str, str]]) -> None:
    labels, _ = comparison.labels(groups)
    assert len(set(labels)) == len(groups)
    assert all(labels)


def test_equal_numbers_are_one_setting() -> None:
    assert [comparison.written(value) for value in (1, 1.0, 0.5, 1e-6, True, None, [0.9, 2.0], "x")] == [
        *("1", "1", "0.5", "1e-06", "true", "null", "[0.9,2]", "x")
    ]


# --- what is said of a difference


def test_groups_of_the_same_seeds_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs differ by 0.125 and 0.1875: a narrow interval where the spread between seeds is wide."""
    seeds(tmp_path, "a", {0: 0.25, 1: 0.75}, "algo=dpo")
    seeds(tmp_path, "b", {1: 0.9375, 0: 0.375}, "algo=nca")
    base, other = compared(capsys, str(tmp_path))["metrics"][REWARD]
    assert (base["group"], base["seeds"], base["values"], base["difference"]) == (
        "algo=dpo",
        [0, 1],
        [0.25, 0.75],
        None,
    )
    assert (base["low"], base["mean"], base["high"]) == pytest.approx((0.5 - T_1 / 4, 0.5, 0.5 + T_1 / 4))
    difference = other["difference"]
    assert difference["method"] == "paired, 2 seeds"
    bounds = tuple(difference[name] for name in ("low", "estimate", "high"))
    assert bounds == pytest.approx((0.15625 - T_1 / 32, 0.15625, 0.15625 + T_1 / 32))
    assert difference["leaves_out_0"] is False


def test_groups_of_other_seeds_are_welchs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two and two of equal variance have two degrees of freedom; one shared seed does not make pairs."""
    seeds(tmp_path, "a", {0: 0.125, 1: 0.25}, "algo=dpo")
    seeds(tmp_path, "b", {1: 1.0, 2: 1.125}, "algo=nca")
    difference = compared(capsys, str(tmp_path))["metrics"][REWARD][1]["difference"]
    assert (difference["method"], difference["leaves_out_0"]) == ("Welch", True)
    assert difference["estimate"] == 0.875
    assert difference["high"] - difference["estimate"] == pytest.approx(T_2 * 0.125 / math.sqrt(2))


def test_a_pair_is_of_one_seed_whatever_else_a_group_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds(tmp_path, "a", {0: 9.0, 3: 0.5, 10: 0.25}, "algo=dpo")
    seeds(tmp_path, "b", {10: 0.5, 3: 0.75}, "algo=nca")
    base, other = compared(capsys, str(tmp_path))["metrics"][REWARD]
    assert (base["seeds"], base["values"]) == ([0, 3, 10], [9.0, 0.5, 0.25])
    assert other["difference"] == {
        "estimate": 0.25,
        "low": 0.25,
        "high": 0.25,
        "leaves_out_0": True,
        "method": "paired, 2 seeds",
    }


def test_one_seed_has_a_value_and_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds(tmp_path, "a", {0: 0.5, 1: 1.0}, "algo=dpo")
    seeds(tmp_path, "b", {0: 0.25}, "algo=nca")
    row = compared(capsys, str(tmp_path))["metrics"][REWARD][1]
    assert (row["mean"], row["low"], row["high"]) == (0.25, None, None)
    assert row["difference"] == {
        "estimate": -0.5,
        "low": None,
        "high": None,
        "leaves_out_0": False,
        "method": "one seed",
    }
    assert align("compare", str(tmp_path)) == exits.DONE
    told = capsys.readouterr().out.splitlines()
    assert told[3].split() == ["algo=nca", "1", "0.25", "-0.5", "one", "seed"]
    assert told[-1].startswith("One seed has no interval")


def test_the_table_marks_what_leaves_out_0_and_says_what_intervals_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds(tmp_path, "a", {0: 0.5, 1: 0.75}, "algo=dpo")
    seeds(tmp_path, "b", {0: 1.5, 1: 1.75}, "algo=nca")
    seeds(tmp_path, "c", {0: 0.5, 1: 1.0}, "algo=cdpo")
    assert align("compare", str(tmp_path)) == exits.DONE
    name, _, a, b, c, _, meaning = capsys.readouterr().out.splitlines()
    assert name == REWARD
    assert " ".join(a.split()) == "algo=dpo 2 0.625 ± 1.588 to this one"
    assert " ".join(b.split()) == "algo=nca 2 1.625 ± 1.588 +1 ± 0 * paired, 2 seeds"
    assert " * " not in c
    assert "Not corrected for the number of comparisons, 2 here" in meaning


@pytest.mark.parametrize("text", ["algo.beta=0.1", "beta=0.15", "contrastive beta=0.15"])
def test_against_names_a_group_by_a_part_of_its_label(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole setting is meant before the beginning of another."""
    seeds(tmp_path, "a", {0: 1.0}, "algo=nca", "algo.beta=0.2")
    seeds(tmp_path, "b", {0: 3.0}, "algo=nca", "algo.beta=0.1")
    seeds(tmp_path, "c", {0: 7.0}, "algo=nca", "algo.beta=0.15", "reward=contrastive")
    table = compared(capsys, str(tmp_path), f"against={text}")["metrics"][REWARD]
    assert [row["mean"] for row in table] == ([3.0, 1.0, 7.0] if text == "algo.beta=0.1" else [7.0, 1.0, 3.0])
    assert table[1]["difference"]["estimate"] == 1.0 - table[0]["mean"]


# --- figures


def test_the_usual_figures_are_those_that_all_groups_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Losses of two algorithms are no one figure, unless it is asked for or there is no other."""
    figures = {"loss/last": 0.5, "eval/after/exact_match": 0.25, REWARD: 0.75}
    write(tmp_path / "a", 0, figures, "algo=dpo")
    write(tmp_path / "b", 0, {**figures, "eval/after/alignment": 1.0}, "algo=dpo", "algo.beta=0.2")
    assert list(compared(capsys, str(tmp_path))["metrics"]) == [REWARD, "eval/after/exact_match", "loss/last"]
    write(tmp_path / "c", 0, {"loss/last": 0.5, REWARD: 0.75}, "algo=nca")
    assert list(compared(capsys, str(tmp_path))["metrics"]) == [REWARD]
    assert list(compared(capsys, str(tmp_path), "metric=loss/last")["metrics"]) == ["loss/last"]
    write(tmp_path / "d", 0, {"loss/last": 0.5}, "algo=ipo")
    assert list(compared(capsys, str(tmp_path))["metrics"]) == ["loss/last"]


def test_runs_that_cannot_be_compared_are_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds(tmp_path, "a", {0: 0.5, 1: 0.25}, "algo=dpo")
    seeds(tmp_path, "b", {0: 0.5}, "algo=nca")
    write(tmp_path / "failed", 1, None, "algo=nca")
    write(tmp_path / "repeated", 0, {REWARD: 99.0}, "algo=nca")
    write(tmp_path / "nan", 3, {REWARD: math.nan}, "algo=dpo")
    write(tmp_path / "without", 2, {"steps": 3}, "algo=dpo")
    (write(tmp_path / "damaged", 2, None, "algo=dpo") / "summary.json").write_text("{")
    assert align("compare", str(tmp_path), f"metric={REWARD}") == exits.DONE
    out, err = capsys.readouterr()
    assert "99" not in out
    assert err.count("\n") == 1
    assert f"{tmp_path / 'failed'} (not finished)" in err
    assert f"{tmp_path / 'repeated'} (repeats {tmp_path / 'b-0'})" in err
    assert f"{tmp_path / 'nan'} ({REWARD} is nan)" in err
    assert f"{tmp_path / 'without'} (no {REWARD})" in err
    assert "summary.json is damaged" in err
    left_out = compared(capsys, str(tmp_path), f"metric={REWARD}")["left_out"]
    assert {Path(run["run"]).name for run in left_out} == {"failed", "repeated", "nan", "without", "damaged"}


def test_a_run_counts_once_and_what_is_below_it_is_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds(tmp_path / "sweep", "a", {0: 0.5}, "algo=dpo")
    seeds(tmp_path / "sweep", "b", {0: 0.75}, "algo=nca")
    write(tmp_path / "sweep/b-0/wandb/files", 5, {REWARD: 99.0}, "algo=ipo")
    given = (str(tmp_path / "sweep/b-0"), str(tmp_path / "sweep"))
    assert align("compare", *given) == exits.DONE
    out, err = capsys.readouterr()
    assert [line.split()[:3] for line in out.splitlines()[2:4]] == [["algo=nca", "1", "0.75"], ["algo=dpo", "1", "0.5"]]
    assert err == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["RUNS", "metric=reward"], "Did you mean 'eval/after/reward'?"),
        (["RUNS", "metric=eval/after/rewrad"], "Did you mean 'eval/after/reward'?"),
        (["RUNS", "metric=zzz"], "align show"),
        (["RUNS", "metric=only"], "only algo=dpo has it"),
        (["RUNS", "metric="], "metric= takes names"),
        (["RUNS", "metrics=loss/last"], "Did you mean 'metric='?"),
        (["RUNS", "against=algo"], "2 groups have that in their label"),
        (["RUNS", "against=nothing"], "no group has that in its label"),
        (["RUNS", "against=dpo", "against=nca"], "one part"),
        (["RUNS", "gone"], "gone: there is no such folder"),
        (["RUNS/a-0"], "differ in nothing but their seed"),
        (["empty"], "is not a run directory and holds none"),
        (["RUNS/failed"], "no run has finished"),
        (["metric=loss/last"], "needs run directories"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "RUNS/a-0", 0, {REWARD: 0.5, "only": 1.0}, "algo=dpo")
    seeds(tmp_path / "RUNS", "b", {0: 0.5}, "algo=nca")
    write(tmp_path / "RUNS/failed", 1, None, "algo=nca")
    assert align("compare", *words) == exits.USER
    out, err = capsys.readouterr()
    assert sentence in err.splitlines()[-1] and out == ""


# --- the command


def test_it_starts_without_heavy_libraries(tmp_path: Path) -> None:
    seeds(tmp_path, "a", {0: 0.5, 1: 0.25}, "algo=dpo")
    seeds(tmp_path, "b", {0: 0.5, 1: 0.25}, "algo=nca")
    program = (
        f"import sys; from align_cli.commands import compare; compare.main([{str(tmp_path)!r}]);"
        "sys.exit(str(sorted({'torch', 'transformers', 'wandb', 'hydra', 'deepspeed', 'datasets'} & set(sys.modules))))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == "[]"


def test_completion_knows_options_figures_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/first").mkdir(parents=True)
    assert complete("align compare ru") == ["runs"]
    assert complete("align compare runs/f") == ["runs/first"]
    assert complete("align compare runs --") == ["--json"]
    assert complete("align compare runs metric=loss/last,eval/after/r") == [f"metric=loss/last,{REWARD}"]


# --- item by item


def evaluated(run: Path, values: Mapping[str, float], **made: Any) -> None:
    """What `align evaluate eval=toy` keeps of a run."""
    items = [Item(name, {"exact_match": value}, {}) for name, value in values.items()]
    told = results.figures_of(Result(items))
    options = {"eval": {"path": str(run), "prompt": made.pop("prompt", None)}}
    results.write(run, results.Finished("toy", told, {"samples": 4, **made}, [], {}, options, items))


def test_items_that_both_sides_have_are_compared_in_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds(tmp_path, "dpo", {0: 0.5}, "algo=dpo")
    seeds(tmp_path, "nca", {0: 0.5, 1: 0.5})
    evaluated(tmp_path / "dpo-0", {"a": 0.0, "b": 0.5, "c": 1.0, "only here": 0.25})
    evaluated(tmp_path / "nca-0", {"a": 0.5, "b": 0.5, "c": 1.0})
    evaluated(tmp_path / "nca-1", {"c": 1.0, "b": 1.0, "a": 0.5}, judge_date="another day")
    first, second = compared(capsys, str(tmp_path), "against=dpo")["items"]["eval/toy/exact_match"]
    assert (first["group"], first["items"], first["mean"], first["difference"]) == ("algo=dpo", 4, 0.4375, None)
    assert (second["seeds"], second["items"], second["mean"]) == (2, 3, 2.25 / 3)
    told = second["difference"]
    assert (told["items"], told["estimate"]) == (3, pytest.approx((0.5 + 0.25 + 0) / 3))
    assert told["p"] == 2 / 4  # of the ways to swap two differences that are not 0, two have a mean as far from 0


def test_results_of_other_settings_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, algo, samples in (("dpo", "algo=dpo", 4), ("ipo", "algo=ipo", 4), ("nca", "algo=nca", 1)):
        seeds(tmp_path, name, {0: 0.5}, algo)
        evaluated(tmp_path / f"{name}-0", {"a": 0.0, "b": 1.0}, samples=samples)
    told = compared(capsys, str(tmp_path))
    assert [row["group"] for row in told["items"]["eval/toy/exact_match"]] == ["algo=dpo", "algo=ipo"]
    (left_out,) = [each for each in told["left_out"] if "eval/toy" in each["why"]]
    assert left_out["run"].endswith("nca-0") and "samples 1, not 4" in left_out["why"]


def test_items_that_were_asked_in_other_words_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, prompt in (("dpo", None), ("nca", "Think step by step.")):
        seeds(tmp_path, name, {0: 0.5}, f"algo={name}")
        evaluated(tmp_path / f"{name}-0", {"a": 0.0, "b": 1.0}, prompt=prompt)
    told = compared(capsys, str(tmp_path))
    assert not told["items"]
    (left_out,) = [each for each in told["left_out"] if "eval/toy" in each["why"]]
    assert "eval.prompt Think step by step., not None" in left_out["why"] and "eval.path" not in left_out["why"]


def test_the_table_of_items_says_what_its_intervals_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dpo", "nca"):
        seeds(tmp_path, name, {0: 0.5}, f"algo={name}")
        evaluated(tmp_path / f"{name}-0", {str(n): float(n % 3 == 0 or name == "nca") for n in range(12)})
    assert align("compare", str(tmp_path)) == exits.DONE
    said = capsys.readouterr().out
    assert "eval/toy/exact_match, item by item" in said
    assert "+0.6667 [+0.4167, +0.9167] *  0.0078" in " ".join(said.split()).replace("* 0", "*  0")
    assert "nothing of other seeds" in said


def test_few_items_are_not_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of four differences of 1 the bootstrap says [1, 1], and every way to swap them says p = 2/16."""
    for name in ("dpo", "nca"):
        seeds(tmp_path, name, {0: 0.5}, f"algo={name}")
        evaluated(tmp_path / f"{name}-0", {str(n): float(name == "nca") for n in range(4)})
    assert align("compare", str(tmp_path)) == exits.DONE
    assert "+1 [+1, +1] 0.12" in " ".join(capsys.readouterr().out.split())


def test_a_damaged_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dpo", "nca"):
        seeds(tmp_path, name, {0: 0.5}, f"algo={name}")
    (tmp_path / "nca-0/eval").mkdir()
    for text in ("{", "[]", '{"items": [{"id": 1}], "made": {}}', '{"items": null, "made": {}}'):
        (tmp_path / "nca-0/eval/toy.json").write_text(text)
        assert align("compare", str(tmp_path)) == exits.USER
        assert "toy.json: not an evaluation" in capsys.readouterr().err
