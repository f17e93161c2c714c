"""Recipes: every one that ships composes at both scales, and what is wrong with a file is said with its key."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_runs
import yaml

from align_cli import config, evals, paths, reading, summaries
from align_cli.commands import plan, reproducing
from align_cli.errors import UserError
from align_cli.reproduction import composing, loading
from align_cli.reproduction.recipe import SCALES

SCALE: dict[str, Any] = {
    "cost": "unknown",
    "seeds": 5,
    "common": ["model=hf", "model.path=x", "data=file", "data.path=x"],
    "runs": {"dpo": ["algo=dpo"], "nca": {"sweep": ["algo=nca", "algo.beta=0.1,1"]}},
}
EXPECTED: dict[str, Any] = {
    "claim": "It falls.",
    "figure": "displacement/chosen",
    "of": "dpo",
    "is": {"below": 0},
    "kind": "ours",
    "source": "here",
    "scale": "both",
}
WHOLE: dict[str, Any] = {
    "title": "A title",
    "paper": "arXiv:0000.00000",
    "scales": {"tiny": SCALE, "paper": SCALE},
    "expect": [EXPECTED],
}

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a recipe with some keys changed, by their path with dots; `...` takes one away. Returns its name."""

    def written(**changes: Any) -> str:
        whole = json.loads(json.dumps(WHOLE))
        for key, value in changes.items():
            *way, last = key.split("__")
            node = whole
            for part in way:
                node = node[int(part) if part.isdigit() else part]
            if value is ...:
                del node[last]
            else:
                node[last] = value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")
        return str(path)

    return written


def refused(name: str, scale: str = "tiny") -> list[str]:
    """What is said of a recipe that is wrong, without its path in front of each line."""
    with pytest.raises(UserError) as error:
        composing.composed(loading.load(name), scale)
    lines = str(error.value).splitlines()
    assert all(line.startswith(name) for line in lines)
    return [re.sub(r"^:?\s*", "", line.removeprefix(name)) for line in lines]


def test_there_is_a_recipe() -> None:
    assert "nca/figure5" in loading.names()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", loading.names())
def test_every_recipe_composes_and_plans_at_both_scales(name: str, scale: str) -> None:
    loaded = loading.load(name)
    found = composing.composed(loaded, scale)
    assert found.keys() == {run.name for run in loaded.scales[scale].runs}
    reproducing.refuse_evaluations(loaded, loaded.scales[scale], ())
    for checked in found.values():
        assert "optimizer steps" in " ".join(plan.schedule(checked)) or "epoch" in " ".join(plan.schedule(checked))
        assert re.match(r"\d+ rank", reproducing.memory_line(checked))


@pytest.mark.parametrize("name", loading.names())
def test_every_recipe_is_expected_to_show_something_on_a_small_scale(name: str) -> None:
    loaded = loading.load(name)
    assert any(each.at("tiny") for each in loaded.expect)
    assert loaded.scales["tiny"].seeds >= 5 or all(each.kind == "exact" for each in loaded.expect if each.at("tiny"))


def test_a_recipe_of_one_s_own_is_a_file(write: Write) -> None:
    loaded = loading.load(write())
    assert [run.name for run in loaded.scales["tiny"].runs] == ["dpo", "nca[algo.beta=0.1]", "nca[algo.beta=1]"]
    assert loaded.scales["tiny"].runs[1].overrides[-1] == "algo.beta=0.1"
    with pytest.raises(UserError, match=r"absent\.yaml: there is no such file"):
        loading.load("absent.yaml")
    with pytest.raises(UserError, match="Did you mean 'nca/figure6'"):
        loading.load("nca/figure6a")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"titel": "x"}, r"titel: no such key. Did you mean 'title'\?"),
    "an unknown key of a scale": ({"scales__tiny__seed": 3}, r"scales.tiny.seed: no such key. Did you mean 'seeds'\?"),
    "an unknown key of an expectation": ({"expect__0__colour": 1}, "expect\\[0\\].colour: no such key"),
    "no source": ({"expect__0__source": ...}, "expect\\[0\\].source is missing"),
    "an empty source": ({"expect__0__source": ""}, "expect\\[0\\].source="),
    "no scale": ({"scales__paper": ...}, "scales.paper is missing"),
    "another scale": ({"scales__tniy": SCALE}, r"scales.tniy: no such scale. Did you mean 'tiny'\?"),
    "no claims": ({"expect": []}, "expect=\\[\\]: a recipe claims something"),
    "upside down": ({"expect__0__is": {"within": [1, 0]}}, r"expect\[0\].is.within=\[1, 0\]: it is upside down"),
    "a negative tolerance": ({"expect__0__is": {"equal": {"value": 1, "tolerance": -1}}}, "tolerance=-1"),
    "no tolerance": ({"expect__0__is": {"equal": {"value": 1}}}, "is.equal.tolerance is missing"),
    "a bound that is none": ({"expect__0__is": {"below": "x"}}, r"expect\[0\].is=.*below: NUMBER"),
    "a bound that is nan": ({"expect__0__is": {"below": float("nan")}}, r"expect\[0\].is=.*below: NUMBER"),
    "two bounds": ({"expect__0__is": {"below": 1, "above": 0}}, r"expect\[0\].is=.*within: \[LOW, HIGH\]"),
    "no bound": ({"expect__0__is": ...}, r"expect\[0\].is is missing"),
    "a kind that is none": ({"expect__0__kind": "guess"}, "expect\\[0\\].kind=guess"),
    "a run that is not there": ({"expect__0__of": "dop"}, r"expect\[0\]: dop: no such run .* Did you mean 'dpo'\?"),
    "no run": ({"expect__0__of": ...}, r"expect\[0\].of: which run"),
    "a difference of nothing": ({"expect__0__less": "nowhere"}, r"expect\[0\]: nowhere: no such run"),
    "a trend of one": ({"expect__0__is": "rising"}, r"expect\[0\]: over: \[RUN, ...\] and is: rising or falling"),
    "a spread of one": (
        {"expect__0__of": ..., "expect__0__spread": ["dpo"]},
        r"expect\[0\].spread: give two or more runs, without of, less and over",
    ),
    "a spread and a run": ({"expect__0__spread": ["dpo", "dpo"]}, r"expect\[0\].spread: .* without of"),
    "less than no spread": ({"expect__0__less_spread": ["dpo", "dpo"]}, r"expect\[0\].less_spread: .* as spread"),
    "a spread over nothing": (
        {"expect__0__of": ..., "expect__0__spread": ["dpo", "nowhere"]},
        r"expect\[0\]: nowhere: no such run",
    ),
    "a figure that no run writes": ({"expect__0__figure": "displacement/choosen"}, "dpo writes no such figure.*chosen"),
    "neither runs nor study": ({"scales__tiny__runs": ...}, "scales.tiny: give either runs or a study"),
    "no runs": ({"scales__tiny__runs": {}}, "scales.tiny.runs: give at least one run"),
    "a seed of its own": ({"scales__tiny__common": ["run.seed=3"]}, "run.seed=3: align reproduce sets it"),
    "a place of its own": ({"scales__tiny__common": ["run.dir=x"]}, "run.dir=x: align reproduce sets it"),
    "several values": ({"scales__tiny__runs__dpo": ["algo=dpo,nca"]}, "several values need {sweep:"),
    "an override that is none": ({"scales__tiny__runs__dpo": ["algo=dpo", 3]}, "scales.tiny.runs.dpo=.*quotes"),
    "an override that is wrong": ({"scales__tiny__runs__dpo": ["algo=dop"]}, "runs.dpo: algo=dop: no such choice"),
    "a name with a blank": ({"scales__tiny__runs": {"a b": ["algo=dpo"]}}, "runs.a b: use letters, digits"),
    "a run that needs another": ({"scales__tiny__runs__dpo": ["model.path=<sft>/x"]}, "<sft>: there is no such run"),
    "a run that needs itself": ({"scales__tiny__runs__dpo": ["model.path=<dpo>/model"]}, "it waits for itself"),
    "an evaluation that is none": ({"scales__tiny__evaluate": ["tyo"]}, r"tyo: no such evaluation. Did you mean 'toy'"),
    "no seeds": ({"scales__tiny__seeds": 0}, "scales.tiny.seeds=0"),
    "a study that is none": (
        {"scales__tiny__runs": ..., "scales__tiny__common": ..., "scales__tiny__study": "nothing"},
        "scales.tiny.study=nothing: there is no function",
    ),
    "a drawing that is none": ({"draw": [{"pie": {}}]}, r"draw\[0\]=.*{lines:"),
    "points without a source": ({"paper_figure": {"x": "a", "y": "b", "series": {}}}, "paper_figure.source is missing"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_with_its_key(what: str, write: Write) -> None:
    changes, told = WRONG[what]
    assert any(re.search(told, line) for line in refused(write(**changes))), what


def test_all_that_is_wrong_is_said_at_once(write: Write) -> None:
    lines = refused(write(titel="x", scales__tiny__seeds=0, expect__0__source=...))
    assert len(lines) == 3


@pytest.mark.parametrize(
    "text, told",
    [
        ("title: [a\n", "not YAML"),
        ("title: a\ntitle: b\n", "duplicate key title"),
        ("title: !!python/object/apply:os.system [id]\n", "not YAML"),
        ("- a\n", "list is not a recipe"),
        ("", "NoneType is not a recipe"),
        ("1: a\n", "keys should be strings"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        loading.load(str(path))


def test_a_run_reads_the_directory_of_another_with_the_same_seed(write: Write) -> None:
    runs = {"sft": ["algo=sft"], "dpo": ["algo=dpo", "model.path=<sft>/model"]}
    loaded = loading.load(write(scales__tiny__runs=runs, scales__paper__runs=runs))
    _, dpo = loaded.scales["tiny"].runs
    assert dpo.needs == ["sft"]
    given = dpo.placed(3, {"sft": Path("there/it's/seed=3")}, Path("here"))
    tree = config.compose("train", given)
    assert tree["model"]["path"] == "there/it's/seed=3/model"
    assert tree["run"] == {"dir": "here", "seed": 3}


def test_what_a_run_overrides_comes_after_what_is_common(write: Write) -> None:
    loaded = loading.load(write(scales__tiny__runs__dpo=["algo=dpo", "model.path=y"]))
    assert loaded.scales["tiny"].runs[0].overrides.count("model.path=x") == 0
    assert composing.composed(loaded, "tiny")["dpo"].model.path == "y"


# --- what a run writes

SAMPLED = ("scorer=contains", "scorer.words=['1']", "source.samples=2", "source.max_new_tokens=4")


@pytest.mark.parametrize(
    "given",
    [
        ("algo=nca",),
        ("algo=dpo", "data.pairs=best_random"),
        ("algo=sft", "data.responses=1"),
        ("algo=simpo", "data.pairs=best_worst"),
        ("algo=bradley_terry", "data.pairs=all"),
        ("algo=fdpg", *SAMPLED, "eval.samples=2"),
        ("algo=ppo", *SAMPLED),
    ],
    ids=lambda given: given[0],
)
def test_the_figures_that_a_run_can_write_are_those_that_it_writes(
    given: tuple[str, ...], tiny_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    """But for divergences that are infinite, which no run writes."""
    more = ("train.steps=1", "train.prompts=2", "eval.groups=6")
    whole = small_runs.overrides(tiny_model, ragged_file, tmp_path / "run", *given, *more)
    known = summaries.names(reading.read(config.compose("train", whole)))
    assert small_runs.align("train", *whole) == 0
    written = set(small_runs.summary(tmp_path / "run"))
    assert written <= known
    absent = {name for name in known - written if not re.search(r"rank_\d+$|divergence/", name)}
    assert absent == set()


def test_recipes_are_listed_without_anything_heavy() -> None:
    assert all(loading.title(path) != "no title" for path in loading.names().values())
    assert paths.recipes().is_dir()


def test_claims_on_evaluations_name_figures_that_their_runners_write() -> None:
    """Beside lm-eval's, whose names are its tasks'."""
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(evals.__file__).parent.glob("*.py")))
    named: set[tuple[str, str]] = set()
    for loaded in map(loading.load, loading.names()):
        choices = {choice for scale in loaded.scales.values() for choice in scale.evaluations}
        for figure in {name for each in loaded.expect for name in each.figures}:
            first, *rest = figure.split("/")
            if first == "eval" and rest[0] in choices:
                named.add((rest[0], rest[1]))
    runners = {
        choice: yaml.safe_load((paths.conf() / "eval" / f"{choice}.yaml").read_text())["name"] for choice, _ in named
    }
    ours = {name for choice, name in named if runners[choice] != "harness"}
    assert len(ours) > 5
    assert [name for name in sorted(ours) if f'"{name}"' not in source and not name.startswith("pass@")] == []
