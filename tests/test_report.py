"""`align report`: what a page says of runs as they lie on the disk, and that it needs nothing beside itself."""

import base64
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import browser
import pytest
import small_runs
import wandb_files
import yaml
from small_runs import align

from align_cli import exits, metrics, rundir, train
from align_cli.commands.completion import complete
from align_cli.report import content, figures, page, single
from align_cli.report.figures import Bar, Grid, Line, Point, Scale
from align_cli.statistics import Interval
from align_cli.tracking import METRICS, Track, Tracker

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>$x$ \x00\ud800 \u6587"
REWARD = "eval/after/reward"
T_1 = math.tan(0.475 * math.pi)  # the 97.5 % quantile of Student's t with one degree of freedom
FELL = {"displacement/chosen": -2.5, "displacement/fraction_down": 0.75, "displacement/rejected": -9.0}


TREE = """
algo: {name: nca, alpha: 0.1, beta: 0.1}
data: {name: toy, path: world, responses: 4}
model: {name: tiny, path: world}
source: {name: dataset}
reference: {name: cached}
engine: {name: torch}
train: {prompts: 32, lr: 3.0e-4}
eval: {groups: 256}
"""


def write(run: Path, *overrides: str, seed: int = 0, figures: Mapping[str, Any] | None = None, lines: int = 0) -> Path:
    """A run directory as `align train` leaves it; without figures, as it does where it has not finished."""
    run.mkdir(parents=True)
    tree = yaml.safe_load(TREE)
    for key, value in (override.split("=") for override in overrides):
        section, _, option = key.partition(".")
        tree[section][option or "name"] = yaml.safe_load(value)
    rundir.write_config(run, {**tree, "run": {"dir": str(run), "seed": seed}})
    rows = [{"step": step, "loss": 1 / step, "displacement/chosen": -0.1 * step} for step in range(1, lines + 1)]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if figures is not None:
        rundir.write_summary(run, figures)
    return run


def report(*words: str, out: Path) -> str:
    assert align("report", *words, f"out={out}") == exits.DONE
    return out.read_text(encoding="utf-8")


class Words(HTMLParser):
    """The words of a page, without its style and its script."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["style"], ["script"]):
            self.found.append(data)


def words(html: str) -> str:
    parser = Words()
    parser.feed(html)
    return " ".join(" ".join(parser.found).split())


# --- figures


@functools.cache
def kinds(text: str) -> dict[str, str]:
    """A figure of each kind, with `text` wherever text may be."""
    nan = math.nan
    return {
        "lines": figures.lines(
            [
                Line(label=text, x=[0, 1, 2], y=[0, nan, 2], low=[-1, nan, 1], high=[1, nan, 3]),
                Line(label="b", x=[0, 1], y=[1, math.inf], dashed=True),
            ],
            title=text,
            x=text,
            y=text,
            level=0,
        ),
        "bars": figures.bars(
            [Bar(label=text, value=-0.5, low=-1, high=0.25), Bar(label="b", value=nan, series=text)], title=text, x=text
        ),
        "scatter": figures.scatter(
            [Point(x=0, y=1, label=text, series=text), Point(x=1, y=nan), Point(x=2, y=2, hollow=True)],
            title=text,
            x=text,
            y=text,
            frontier=True,
        ),
        "heat": figures.heat(
            Grid(rows=[text, "b"], columns=["c", text], values=[[1, -2], [nan, 0.5]]),
            title=text,
            x=text,
            y=text,
            centre=0,
        ),
        "parallel": figures.parallel(
            [Scale(label=text, values=[0, 1], ticks=[text, "b"]), Scale(label="c", values=[2, nan])], title=text
        ),
        "empty": figures.lines([], title=text, x=text, y=text),
    }


@pytest.mark.parametrize("kind", kinds("x"))
def test_a_figure_is_svg_in_the_page_s_colours_and_its_text_is_text(kind: str) -> None:
    svg = kinds(HOSTILE)[kind]
    tree = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="http://www.w3.org/1999/xlink" ', 1))
    texts = " ".join(each.text or "" for each in tree.iter("text"))
    assert "<script>alert(1)" in texts and "$x$" in texts
    assert not re.search(r"#0[1-4]0[0-9a-f]{3}\b|font-family|<style|<!--|<metadata", svg)
    assert "var(--ink)" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}, "a colour that no page can change"


def test_two_figures_share_no_identifier_and_the_same_figure_is_the_same_text() -> None:
    one, other = kinds("x"), kinds("y")
    assert one == kinds.__wrapped__("x")
    every = [set(re.findall(r'id="([^"]+)"', svg)) for svg in (*one.values(), *other.values())]
    assert not any(a & b for a, b in itertools.combinations(every, 2))


def test_a_band_is_student_s_interval_at_the_steps_that_all_seeds_have() -> None:
    line = figures.averaged("", [{1: 0.25, 2: 1.0, 3: 9.0}, {2: 1.5, 1: 0.75}])
    assert (list(line.x), list(line.y)) == ([1, 2], [0.5, 1.25])
    assert line.low is not None and line.high is not None
    assert [*line.low, *line.high] == pytest.approx([0.5 - T_1 / 4, 1.25 - T_1 / 4, 0.5 + T_1 / 4, 1.25 + T_1 / 4])
    assert figures.averaged("", [{1: 0.25}]).low is None
    broken = figures.averaged("", [{1: math.nan}, {1: 1.0}])
    assert math.isnan(broken.y[0])


def test_a_long_line_keeps_its_ends_and_every_spike() -> None:
    values = [0.0] * 10_001
    values[1234], values[5678], values[9] = 7.0, -7.0, math.nan
    kept = figures.thinned(values)
    assert len(kept) <= figures.MOST + 2 and {0, 1234, 5678, 10_000} <= set(kept)
    assert figures.thinned(values[:50]) == list(range(50))


def test_a_command_is_told_as_it_is_typed() -> None:
    told = single.written(["/somewhere/align", "train", "run.dir='a,b=c'", "data.path=a b", "x='$HOME'"])
    assert told == """align train "run.dir='a,b=c'" 'data.path=a b' 'x='"'"'$HOME'"'"''"""
    assert single.written(["/somewhere/worker.py", "RUN"]) == "python -m align_cli.worker RUN"


def test_the_frontier_is_what_none_beats_at_its_kl_or_less() -> None:
    points = [Point(x=x, y=y) for x, y in [(2, 5), (1, 1), (1, 3), (3, 4), (4, 6), (0, 2)]]
    assert [(p.x, p.y) for p in figures.pareto(points)] == [(0, 2), (1, 3), (2, 5), (4, 6)]


@pytest.mark.parametrize(
    ("values", "signed", "told"),
    [
        ([0.5, 0.25, 0.0], False, ["0.500", "0.250", "0.000"]),
        ([-2.5, 12.0], True, ["−2.5", "+12.0"]),
        ([1234.5], False, ["1,234"]),
        ([1e-6, 2.5e-5], False, ["1e−06", "2.5e−05"]),
        ([math.nan, 1.0], False, ["not finite", "1.00"]),
        ([-0.00001, 1.0], True, ["0.00", "+1.00"]),
    ],
)
def test_numbers_that_are_read_together_have_equal_decimals(values: list[float], signed: bool, told: list[str]) -> None:
    assert figures.numbers(values, signed=signed) == told


def test_a_cell_s_colour_is_the_share_of_its_value() -> None:
    svg = figures.heat(Grid(rows=["a"], columns=["b", "c", "d"], values=[[0, 0.5, 1]]), title="", x="", y="")
    assert re.findall(r"series-1\) (\d+)%", svg) == ["6", "53", "100"]
    svg = figures.heat(Grid(rows=["a"], columns=["b", "c", "d"], values=[[-1, 0, 0.5]]), title="", x="", y="", centre=0)
    assert re.findall(r"series-(\d)\) (\d+)%", svg) == [("2", "100"), ("1", "0"), ("1", "50")]


def test_every_curve_of_a_page_is_one_that_a_run_logs() -> None:
    known = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (metrics, train))
    for name in itertools.chain.from_iterable(panel.metrics for panel in single.PANELS):
        assert f'"{name}"' in known or f'"{name.removeprefix("divergence/")}": (' in known, name


# --- pages


def everything(text: str) -> list[page.Section]:
    parts: list[page.Section] = [page.Verdict(text, "bad"), page.Heading(text), page.Text(text), page.Bullets([text])]
    parts += [
        page.Facts([(text, text)]),
        page.Table([text, "n"], [[text, 1], ["b", None]], sortable=True, caption=text),
    ]
    parts += [page.Figure(svg, text) for svg in kinds(text).values()]
    parts += [page.Samples([(text, None, text)]), page.Commands([text]), page.Folded(text, [page.Text(text)])]
    return parts


def test_whatever_a_page_says_is_text(tmp_path: Path) -> None:
    page.write(tmp_path / "page.html", HOSTILE, everything(HOSTILE))
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    parser = Words()
    parser.feed(html)
    assert parser.tags.count("script") == 1 and "img" not in parser.tags
    assert "\x00" not in html and "alert(1)" in words(html)


def test_the_page_s_policy_admits_its_own_script_and_no_request() -> None:
    html = page.render("t", [])
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert f"script-src 'sha256-{digest}';" in policy and policy.startswith("default-src 'none';")
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", html)


def test_numbers_of_a_table_are_aligned_and_sorted_by_their_value() -> None:
    table = page.Table(
        ["run", "K", "beta", "score"],
        [["a", 10, "0.05", Interval(0.5, 0.25, 0.75)], ["b", 2, "null", math.nan], ["c", 3, "1e-3", None]],
        sortable=True,
    )
    html = page.render("t", [table])
    cells = re.findall(r"<td([^>]*)>([^<]*)</td>", html)
    assert [text for _, text in cells[:4]] == ["a", "10", "0.05", "0.500 [0.250, 0.750]"]
    keys = [re.findall('data-key="([^"]*)"', attributes) for attributes, _ in cells]
    assert keys == [[], ["10.0"], ["0.05"], ["0.5"], [], ["2.0"], [""], [""], [], ["3.0"], ["0.001"], [""]]


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", figures={"steps": 1})
    for out in (tmp_path / "absent" / "page.html", tmp_path, Path("/proc/page.html")):
        assert align("report", str(run), f"out={out}") == exits.USER
        assert capsys.readouterr().err.count("\n") == 1


# --- a run


@pytest.mark.parametrize(
    ("chosen", "share", "sentence", "tone"),
    [
        (-2.5, 0.75, "Likelihood displacement: chosen responses became less likely. −2.50 nats", "bad"),
        (-2.5, 0.25, "most chosen responses did not fall, but others fell far", "warning"),
        (0.5, 0.75, "most chosen responses fell, but not far", "warning"),
        (0.5, 0.25, "No likelihood displacement", "good"),
        (math.nan, 0.0, "not a number any more", "bad"),
    ],
)
def test_the_verdict_on_displacement(chosen: float, share: float, sentence: str, tone: str, tmp_path: Path) -> None:
    told = {"steps": 3, "displacement/chosen": chosen, "displacement/fraction_down": share}
    run = write(tmp_path / "run", "eval.groups=20", figures=told)
    rundir.write_env(run, device="cpu", ranks=1, data={"held_out": 64})
    (verdict, *_) = single.verdicts(content.read(run, whole=True))
    assert isinstance(verdict, page.Verdict)
    assert sentence in verdict.text and verdict.tone == tone
    # Wilson's interval of 15 and of 5 out of 20
    bounds = {0.75: "75% of 20 [53%, 89%] fell", 0.25: "25% of 20 [11%, 47%] fell"}
    assert bounds.get(share, "") in verdict.text


def test_without_a_reference_the_verdict_is_of_the_mean_alone(tmp_path: Path) -> None:
    told = {"steps": 3, "eval/before/logps/chosen": -10.0, "eval/after/logps/chosen": -12.5}
    text = words(report(str(write(tmp_path / "run", figures=told)), out=tmp_path / "page.html"))
    assert "became less likely: −2.50 nats on average. Which share of them fell is not known" in text


def test_a_change_counts_where_the_intervals_part(tmp_path: Path) -> None:
    def ends(name: str, *bounds: float) -> dict[str, float]:
        return dict(zip((name, f"{name}_low", f"{name}_high"), bounds, strict=True))

    told = ends("eval/before/reward", 0.4, 0.3, 0.5) | ends(REWARD, 0.7, 0.6, 0.8)
    told |= ends("eval/before/exact_match", 0.4, 0.3, 0.5) | ends("eval/after/exact_match", 0.55, 0.45, 0.65)
    text = words(report(str(write(tmp_path / "run", figures=told)), out=tmp_path / "page.html"))
    assert "Held-out mean reward of samples rose: 0.400 [0.300, 0.500] before, 0.700 [0.600, 0.800] after" in text
    assert "Held-out exact match of samples may not have changed" in text


def test_what_surprises_is_said(tmp_path: Path) -> None:
    run = write(tmp_path / "run", figures={"steps": 3, "loss/last": math.nan}, lines=3)
    lines = (run / METRICS).read_text().splitlines()
    lines[1] = "{damaged"
    more = [json.dumps({"step": 4, "loss": "nan"}), "[]", '{"step": 5, "loss"']  # the last one without an end
    (run / METRICS).write_text("\n".join([*lines, *more]))
    for device in ("cpu", "cuda"):
        rundir.write_env(run, device=device, ranks=1, data={"rows": 9, "too_long": 2, "malformed": 1})
    (run / rundir.SAMPLES).write_text("{")
    text = words(report(str(run), out=tmp_path / "page.html"))
    for told in (
        "metrics.jsonl: lines 2, 5 cannot be read and are left out.",
        "loss is not a number at step 4.",
        "loss/last is not a number in the end.",
        "It was started again once",
        "Its sessions differ in the device.",
        "Of 9 rows some were dropped: 1 malformed and skipped, 2 too long.",
        "samples.json cannot be read",
    ):
        assert told in text, told


def test_a_run_that_has_not_finished_is_shown_as_it_stands(tmp_path: Path) -> None:
    run = write(tmp_path / "run", lines=3)
    with rundir.lock(run):
        running = words(report(str(run), out=tmp_path / "page.html"))
    assert "This run is running, at step 3" in running and "in use by process" in running
    stopped = words(report(str(run), out=tmp_path / "page.html"))
    assert "This run is stopped after step 3" in stopped
    (run / METRICS).unlink()
    assert "This run is not started" in words(report(str(run), out=tmp_path / "page.html"))


def test_a_real_run_has_curves_samples_and_evaluations(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert align("train", *small_runs.overrides(tiny_model, pairs_file, run, "algo=dpo", "train.steps=4")) == exits.DONE
    rundir.write_atomic(run / rundir.SAMPLES_BEFORE, json.dumps([{"prompt": "1+1=", "greedy": "three"}]))
    rundir.write_atomic(run / rundir.SAMPLES, json.dumps([{"prompt": "1+1=", "greedy": HOSTILE.replace("\ud800", "")}]))
    told = {
        "name": "toy",
        "figures": {"reward": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 9}, "other": {"value": 2.0}, "bad": []},
        "notes": ["A note."],
    }
    (run / "eval").mkdir()
    (run / "eval" / "toy.json").write_text(json.dumps({**told, "made": {"seed": 3}, "items": []}))
    html = report(str(run), out=tmp_path / "page.html")
    text = words(html)
    for panel in single.PANELS[:7]:
        assert panel.title in text or panel.title == "Rating of samples", panel.title
    assert "chosen, held out" in text and "optimizer step" in text
    for part in ("three", "alert(1)", "0.500 [0.250, 0.750]", "A note.", "algo dpo (beta = "):
        assert part in text, part
    assert str(Path(sys.executable).parent) not in html.replace(str(tmp_path), "")


# --- several runs


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """α, β and K, three values each; the reward grows with all of them."""
    for a, b, k in itertools.product(range(3), range(3), range(3)):
        told = {"steps": 2, REWARD: 0.1 * a + 0.01 * b + 0.2 * k, **FELL, "displacement/chosen": b - 1.5}
        settings = f"algo.alpha={(0.01, 0.1, 1)[a]}", f"algo.beta={(0.03, 0.1, 0.3)[b]}", f"data.responses={k + 2}"
        write(tmp_path / "grid" / f"{a}{b}{k}", *settings, figures=told)
    return tmp_path / "grid"


def drawn(html: str) -> list[str]:
    return re.findall(r'<svg role="img" aria-label="([^"]*)"', html)


def test_a_sweep_has_a_map_for_each_k_a_curve_over_k_and_every_run(grid: Path, tmp_path: Path) -> None:
    html = report(str(grid), out=tmp_path / "page.html")
    assert drawn(html) == [
        *(["K = 2", "K = 3", "K = 4"] * 2),
        "held-out reward against the likelihood of chosen responses",
        "held-out reward over K",
        "Every run through its settings",
    ]
    assert html.count("<tr>") == 1 + 27
    text = words(html)
    assert "The highest held-out reward is 0.620, of algo.alpha=1 algo.beta=0.3 data.responses=4" in text
    assert "became less likely in 18 of 27 configurations (−1.50 to +0.50 nats" in text


def test_losses_of_other_algorithms_have_no_best(tmp_path: Path) -> None:
    for place, (algo, loss) in enumerate((("dpo", 0.6), ("nca", 1.3))):
        write(tmp_path / "runs" / str(place), f"algo={algo}", figures={"loss/last": loss})
    assert "The least" not in words(report(str(tmp_path / "runs"), out=tmp_path / "page.html"))
    for place, lr in enumerate(("1e-4", "3e-4")):
        write(tmp_path / "rates" / str(place), f"train.lr={lr}", figures={"loss/last": 0.5 + place})
    assert "The least last loss is 0.5" in words(report(str(tmp_path / "rates"), out=tmp_path / "page.html"))


def test_where_runs_know_their_kl_the_score_stands_against_it(grid: Path, tmp_path: Path) -> None:
    for place, run in enumerate(sorted(grid.iterdir())):
        told = rundir.read_summary(run) or {}
        rundir.write_summary(run, {**told, "eval/after/rollout/kl": 0.1 * place})
    html = report(str(grid), out=tmp_path / "page.html")
    assert "held-out reward against KL" in drawn(html)
    assert "what none beats at its KL or less" in words(html)


def test_differences_over_seeds_are_those_of_align_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (dpo, nca) in enumerate([(0.25, 0.5), (0.5, 0.8125)]):
        write(tmp_path / f"runs/dpo-{seed}", "algo=dpo", seed=seed, figures={"steps": 2, REWARD: dpo}, lines=2)
        write(tmp_path / f"runs/nca-{seed}", "algo=nca", seed=seed, figures={"steps": 2, REWARD: nca}, lines=2)
    html = report(str(tmp_path / "runs"), out=tmp_path / "page.html")
    capsys.readouterr()
    assert align("compare", str(tmp_path / "runs"), "--json") == exits.DONE
    (told,) = [row["difference"] for row in json.loads(capsys.readouterr().out)["metrics"][REWARD][1:]]
    bounds = figures.numbers([told["estimate"], told["low"], told["high"]])
    assert f"{bounds[0]} [{bounds[1]}, {bounds[2]}]" in words(html)
    assert "Log-likelihood since the start: chosen" in drawn(html) and "held-out reward" in drawn(html)


def test_runs_that_are_not_compared_are_shown_and_named(grid: Path, tmp_path: Path) -> None:
    write(grid / "stopped", "algo.alpha=0.1", lines=3)
    write(grid / "again", "algo.alpha=0.01", "algo.beta=0.03", "data.responses=2", figures={"steps": 2, REWARD: 9.0})
    (write(grid / "broken") / "config.yaml").write_text("hydra: {}")
    text = words(report(str(grid), out=tmp_path / "page.html"))
    assert "Of 29 runs 28 have finished; 1 stopped." in text
    assert "Not compared (not finished): stopped." in text
    assert "unreadable" in text and ": broken." in text
    assert "is 0.620" in text, "what repeats a configuration and a seed is no better run"


@pytest.mark.parametrize("metric", ["loss/last", "displacement/rejected"])
def test_runs_are_sorted_by_the_figure_that_is_asked_for(metric: str, tmp_path: Path) -> None:
    for name, value in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        write(tmp_path / "runs" / name, f"algo.beta={value}", figures={"steps": 2, metric: value})
    write(tmp_path / "runs" / "without", "algo.beta=9", figures={"steps": 2})
    html = report(str(tmp_path / "runs"), f"metric={metric}", out=tmp_path / "page.html")
    order = re.findall(r"<td>(\w+)</td></tr>", html)
    assert order == (["b", "c", "a", "without"] if metric == "loss/last" else ["a", "c", "b", "without"])


def test_a_thousand_runs_make_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    for number in range(1000):
        run = tmp_path / "runs" / f"{number:04}"
        run.mkdir(parents=True)
        tree = {"algo": {"name": "nca", "beta": number}, "data": {"responses": 2 + number % 3}}
        (run / "config.yaml").write_text(json.dumps({**tree, "run": {"seed": 0}}))
        (run / "summary.json").write_text(json.dumps({REWARD: number % 17, **FELL}))
    html = report(str(tmp_path / "runs"), out=tmp_path / "page.html")
    assert html.count("<tr>") == 1001
    assert len(html) < 3e6


# --- the command


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["gone"], "gone: there is no such folder."),
        (["runs", "ouT=x"], "Did you mean 'out='?"),
        (["empty"], "is not a run directory and holds none"),
        (["runs", "metric=eval/after/rewrad"], "Did you mean 'eval/after/reward'?"),
        (["runs", "metric="], "give one name after metric=."),
        (["runs/a", "metric=eval/after/reward"], "metric=eval/after/reward compares runs, and runs/a is one"),
        (["runs", "out=a", "out=b"], "give one file after out=."),
        (["runs/a", "runs/b"], "2 folders are given; out=FILE"),
        (["runs", "out=precious.txt"], "precious.txt exists and is not a page of align report"),
        (["runs", "out=runs"], "runs is a folder"),
        (["out=x.html"], "needs a run directory"),
    ],
)
def test_a_mistake_is_one_sentence(
    given: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    Path("precious.txt").write_text("precious")
    for name in ("a", "b"):
        write(tmp_path / "runs" / name, f"algo.beta={ord(name)}", figures={"steps": 1, REWARD: 0.5})
    assert align("report", *given) == exits.USER
    out, err = capsys.readouterr()
    assert sentence in err and err.count("\n") == 1 and out == ""
    assert Path("precious.txt").read_text() == "precious"
    assert not list(tmp_path.rglob("*.html"))


def test_the_page_lies_in_the_folder_and_may_be_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", figures={"steps": 1})
    for _ in range(2):
        assert align("report", str(run)) == exits.DONE
        assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    (tmp_path / "results.json").touch()
    assert align("report", str(tmp_path)) == exits.DONE
    assert capsys.readouterr().out == f"{tmp_path / 'runs.html'}\n"


def test_completion_knows_options_and_figures() -> None:
    assert complete("align report out") == ["out="]
    assert complete("align report metric=loss") == ["metric=loss/last"]


def test_it_starts_without_heavy_libraries(tmp_path: Path) -> None:
    write(tmp_path / "a", figures={"steps": 1, REWARD: 0.5})
    program = (
        f"import sys; from align_cli.commands import report; report.main([{str(tmp_path)!r}]);"
        "sys.exit(str(sorted({'torch', 'transformers', 'wandb', 'hydra', 'deepspeed', 'datasets'} & set(sys.modules))))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == "[]"


def test_the_page_of_a_run_goes_to_its_weights_and_biases_run(tmp_path: Path) -> None:
    run = write(tmp_path / "run", figures={"steps": 2})
    track = Track(name="wandb", project="mine", group=None, run_name=None, every=1, lines=10)
    tree = {**rundir.read_config(run), "track": dataclasses.asdict(track)}
    rundir.write_config(run, tree)
    with Tracker(run, tree, track, steps=2, resumed=None) as tracker:
        tracker.log(1, {"loss": 1.0})
        tracker.log(2, {"loss": 0.5})
        tracker.close({"steps": 2})
    (logged,) = wandb_files.read(run)
    assert align("report", str(run)) == exits.DONE
    (shown,) = [each for each in wandb_files.read(run) if "report._type" in each["steps"][0]]
    assert shown["id"] == logged["id"]
    assert (shown["steps"][0]["report._type"], shown["steps"][0]["_step"]) == ("html-file", 3)
    (file,) = run.glob("wandb/offline-run-*/files/media/html/*.html")
    assert file.read_text(encoding="utf-8") == (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("groups", [("swept", "swept"), ("swept", "other"), (None, None)])
def test_the_page_of_a_sweep_goes_to_its_weights_and_biases_group(
    groups: tuple[str | None, str | None], tmp_path: Path
) -> None:
    track = {"name": "wandb", "project": "mine", "run_name": None, "every": 1, "lines": 10}
    for name, group in zip("ab", groups, strict=True):
        run = write(tmp_path / "sweep" / name, figures={"steps": 2})
        rundir.write_config(run, {**rundir.read_config(run), "track": {**track, "group": group}})
    assert align("report", str(tmp_path / "sweep")) == exits.DONE
    shown = wandb_files.read(tmp_path / "sweep")
    assert [(each["project"], each["group"]) for each in shown] == ([("mine", "swept")] if groups[1] == "swept" else [])
    assert all(each["steps"][0]["report._type"] == "html-file" for each in shown)


# --- in a browser

needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium to open pages with")


@needs_browser
def test_a_page_opens_without_an_error_and_asks_for_nothing(grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    page.write(out, HOSTILE, everything(HOSTILE))
    (tmp_path / "hostile").mkdir()
    told = browser.visit(out, tmp_path / "hostile")
    assert (told.said, told.asked) == ([], [])
    assert "<h1>" in told.dom
    report(str(grid), out=out)
    told = browser.visit(out, tmp_path)
    assert (told.said, told.asked) == ([], [])
    assert told.dom.count("<svg") == 9


@needs_browser
def test_the_browser_s_witness_sees_an_error_and_a_request(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('broken')</script>")
    told = browser.visit(bad, tmp_path)
    assert any("broken" in line for line in told.said) and told.asked == ["http://127.0.0.1:9/x.png"]


@needs_browser
def test_a_click_on_a_heading_sorts_and_a_second_one_turns_the_order(tmp_path: Path) -> None:
    rows: list[Sequence[page.Cell]] = [["b", 2.0], ["c", None], ["a", 10.0], ["d", -3.0]]
    html = page.render("t", [page.Table(["name", "value"], rows, sortable=True)])
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)  # the test has a script of its own
    click = "document.querySelectorAll('th button')[1].click();"
    order = "document.title += [...document.querySelectorAll('td:first-child')].map(c => c.textContent).join('');"
    (tmp_path / "page.html").write_text(html.replace("</body>", f"<script>{(click + order) * 2}</script></body>"))
    assert "<title>tdbacabdc</title>" in browser.visit(tmp_path / "page.html", tmp_path).dom
