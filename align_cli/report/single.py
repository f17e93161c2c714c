"""The page of one run: the verdict first, then figures, curves, evaluations, samples, and what was run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align_cli import statistics, terminal
from align_cli.report import content, figures
from align_cli.report.content import Content
from align_cli.report.page import (
    Bullets,
    Cell,
    Commands,
    Facts,
    Figure,
    Folded,
    Heading,
    Samples,
    Section,
    Table,
    Text,
    Tone,
    Verdict,
)
from align_cli.statistics import Interval

FALL, SHARE = "displacement/chosen", "displacement/fraction_down"


@dataclass(frozen=True)
class Panel:
    """A figure over the steps: metric -> what its line is called."""

    title: str
    unit: str
    metrics: Mapping[str, str]
    level: float | None = None
    said: str = ""


PANELS = (
    Panel(
        "Log-likelihood since the start",
        "nats of a response",
        {FALL: "chosen", "displacement/rejected": "rejected"},
        level=0,
        said="Below 0, training made responses less likely than they were under the starting model.",
    ),
    Panel(
        "Log-likelihood since the start, per token",
        "nats of a token",
        {"displacement/chosen_per_token": "chosen"},
        level=0,
    ),
    Panel(
        "Log-likelihood",
        "nats of a response",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
        said="Of other prompts in every step.",
    ),
    Panel("Log-likelihood, per token", "nats of a token", {"logps_per_token/chosen": "chosen"}),
    Panel(
        "Implicit rewards",
        "β × nats",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"},
        level=0,
    ),
    Panel(
        "Chosen responses ahead of rejected ones",
        "share",
        {"rewards/accuracies": "accuracy"},
        level=0.5,
        said="By the implicit reward, or by a reward model's score.",
    ),
    Panel("Rating of samples", "rating", {"rollout/score": "mean rating"}),
    Panel(
        "KL to the starting model", "nats of a response", {"rollout/kl": "samples", "objective/kl": "samples, log q/π"}
    ),
    Panel(
        "Distance to the target",
        "nats; TV and JS: 0 to 1",
        {
            "divergence/forward_kl": "KL(p ‖ π)",
            "divergence/reverse_kl": "KL(π ‖ p)",
            "divergence/tv": "total variation",
            "divergence/js": "Jensen–Shannon",
        },
        level=0,
    ),
    Panel("Entropy of samples", "nats of a response", {"rollout/entropy": "entropy"}),
    Panel("Length of samples", "tokens", {"rollout/length": "length"}),
    Panel("Loss", "loss", {"loss": "loss"}),
    Panel("Norm of the gradient, before clipping", "norm", {"grad_norm": "norm"}),
)
JUDGED = {
    "reward": "mean reward of samples",
    "exact_match": "exact match of samples",
    "exact_match_greedy": "exact match of the most likely response",
    "alignment": "mean rating of samples",
}  # figure -> what it is called


def sections(run: Content) -> list[Section]:
    """Everything that the page of a run says, in its order."""
    found: list[Section] = [*verdicts(run), *_notable(run)]
    found += _held_out(run)
    found += curves([("", [run])], "over the prompts of a step; dashed, over held-out prompts")
    found += _evaluations(run)
    found += _compared_samples(run)
    return [*found, *_what_was_run(run)]


def title(run: Content) -> str:
    """What a run is of."""
    return f"{_named(run, 'algo')} on {_named(run, 'data')}, {_named(run, 'model')}"


def _named(run: Content, section: str) -> str:
    return str(run.config.get(f"{section}.name") or run.config.get(section) or f"no {section}")


# --- verdicts


def verdicts(run: Content) -> list[Section]:
    """How it went, in sentences."""
    found: list[Section] = []
    if run.state != "finished":
        last = f", at step {run.steps[-1]['step']:g}" if run.steps and run.user is not None else ""
        told = f"This run is {run.state}{last}: figures of its end are missing."
        if run.user is not None:
            told += f" It is in use by {run.user}; the page made again shows more."
        found.append(Verdict(told, "warning"))
    found += _displacement(run)
    for name, text in JUDGED.items():
        before, after = (content.interval(run.figures, f"eval/{when}/{name}") for when in ("before", "after"))
        if before is not None and after is not None:
            found.append(_change(text, before, after))
    kl = run.figures.get("eval/after/rollout/kl")
    if kl is not None:
        found.append(Verdict(f"The policy's samples are {_plain(kl)} nats of KL from the starting model."))
    agreed = [run.figures.get(f"eval/{when}/rewards/accuracies") for when in ("before", "after")]
    if FALL not in run.figures and agreed[0] is not None and agreed[1] is not None and kl is None:
        found.append(
            Verdict(f"It agrees with {agreed[1]:.1%} of the held-out preferences, before with {agreed[0]:.1%}.")
        )
    return found


def _change(text: str, before: Interval, after: Interval) -> Verdict:
    tone: Tone = "plain"
    moved = "may not have changed"
    if after.low > before.high:
        tone, moved = "good", "rose"
    elif after.high < before.low:
        tone, moved = "bad", "fell"
    told = [f"{_plain(i.estimate)} [{_plain(i.low)}, {_plain(i.high)}]" for i in (before, after)]
    return Verdict(f"Held-out {text} {moved}: {told[0]} before, {told[1]} after (95 %).", tone)


def _displacement(run: Content) -> list[Section]:
    """The verdict on the likelihood of chosen responses: held out where the run has finished, else of its last step."""
    told, where, prompts = run.figures, "on held-out prompts", _held_out_prompts(run)
    if FALL not in told:
        lines = [row for row in run.steps if FALL in row]
        if run.finished or not lines:
            return _without_reference(run)
        told, where, prompts = lines[-1], f"so far, on the prompts of step {lines[-1]['step']:g}", None
    chosen, share = told[FALL], told.get(SHARE, math.nan)
    if not math.isfinite(chosen) or not math.isfinite(share):
        return [Verdict("The likelihood of chosen responses is not a number any more.", "bad")]
    counted = f"{share:.0%} of them"
    if prompts:
        bounds = statistics.wilson(round(share * prompts), prompts)
        counted = f"{share:.0%} of {prompts} [{bounds.low:.0%}, {bounds.high:.0%}]"
    rejected = told.get("displacement/rejected")
    others = f" Rejected ones moved by {figures.signed(rejected)} nats." if rejected is not None else ""
    moved = f"{figures.signed(chosen)} nats on average {where}; {counted} fell.{others}"
    tone: Tone = "warning"
    if chosen < 0 and share >= 0.5:
        tone, verdict = "bad", "Likelihood displacement: chosen responses became less likely"
    elif chosen < 0:
        verdict = "Some likelihood displacement: most chosen responses did not fall, but others fell far"
    elif share > 0.5:
        verdict = "Some likelihood displacement: most chosen responses fell, but not far"
    else:
        tone, verdict = "good", "No likelihood displacement: chosen responses did not become less likely"
    return [Verdict(f"{verdict}. {moved}", tone)]


def _without_reference(run: Content) -> list[Section]:
    """Without a reference the same held-out responses were measured before and after, but not prompt by prompt."""
    before, after = (run.figures.get(f"eval/{when}/logps/chosen") for when in ("before", "after"))
    if before is None or after is None:
        return []
    less = "less" if after < before else "more"
    return [
        Verdict(
            f"Chosen responses on held-out prompts became {less} likely: {figures.signed(after - before)} nats on "
            "average. Which share of them fell is not known without a reference.",
            "bad" if after < before else "good",
        )
    ]


def _held_out_prompts(run: Content) -> int | None:
    """How many held-out prompts the displacement is of, where the run has kept that."""
    there, most = run.environment.get("data", {}).get("held_out"), run.config.get("eval.groups")
    return min(there, most) if isinstance(there, int) and isinstance(most, int) and min(there, most) > 0 else None


def _plain(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if abs(value) < 100 else f"{value:.4g}".replace("-", "−")


# --- what surprises


def _notable(run: Content) -> list[Section]:
    told = list(run.problems)
    earlier = run.environment.get("before", [])
    if earlier:
        when = ", ".join(str(session.get("started", "at an unknown time")) for session in earlier)
        times = "once" if len(earlier) == 1 else f"{len(earlier)} times"
        told.append(f"It was started again {times}; earlier sessions began {when}.")
        for name in ("device", "ranks", "git", "versions"):
            values = [session.get(name) for session in (*earlier, run.environment)]
            if any(value != values[0] for value in values):
                what = {"git": "revision of align", "versions": "versions of its libraries"}.get(name, name)
                told.append(f"Its sessions differ in the {what}.")
    data = run.environment.get("data", {})
    words = {"malformed": "malformed and skipped", "too_long": "too long", "without_preference": "without a preference"}
    lost = [f"{data[name]:,} {text}" for name, text in words.items() if isinstance(data.get(name), int) and data[name]]
    if lost:
        told.append(f"Of {data.get('rows', 'its')} rows some were dropped: {', '.join(lost)}.")
    return [Heading("What is notable"), Bullets(told)] if told else []


# --- figures and curves


def _held_out(run: Content) -> list[Section]:
    """Tables of what was measured before and after; first what has intervals."""
    ends = [name.removeprefix("eval/after/") for name in run.figures if name.startswith("eval/after/")]
    ends = [name for name in ends if not content.is_bound(run.figures, f"eval/after/{name}")]
    sure: list[list[Cell]] = []
    rest: list[list[Cell]] = []
    for name in ends:
        keys = [f"eval/{when}/{name}" for when in ("before", "after")]
        bounded = [content.interval(run.figures, key) for key in keys]
        if bounded[1] is not None:
            sure.append([JUDGED.get(name, name), *bounded])
            continue
        before, after = (run.figures.get(key) for key in keys)
        rest.append([name, before, after, after - before if before is not None and after is not None else None])
    if not ends:
        return []
    found: list[Section] = [Heading("Before and after, on held-out prompts")]
    if sure:
        found.append(
            Table(["figure", "before", "after"], sure, caption="With 95 % intervals over prompts.", by_row=True)
        )
    if rest:
        table = Table(["figure", "before", "after", "change"], rest, by_row=True)
        found.append(Folded("All other held-out figures", [table]) if sure else table)
    return found


def curves(groups: Sequence[tuple[str, Sequence[Content]]], said: str) -> list[Section]:
    """A figure for each panel that there is something for.

    Args:
        groups: a label and the runs of one configuration; their mean is a line, with a band over seeds.
        said: what a step's figures are of.
    """
    found: list[Section] = []
    several = len(groups) > 1
    for panel in PANELS:
        metrics = panel.metrics if not several else dict(list(panel.metrics.items())[:1])
        drawn: list[figures.Line] = []
        for label, runs in groups:
            for metric, name in metrics.items():
                known = [line for line in (content.curve(run.steps, metric) for run in runs) if line]
                if known:
                    drawn.append(figures.averaged(label if several else name, known))
                aside = [line for line in (content.held_out(run, metric) for run in runs) if len(line) > 1]
                if aside and known and not several:
                    drawn.append(figures.averaged(f"{name}, held out", aside, dashed=True, series=name))
        if not any(math.isfinite(value) for line in drawn for value in line.y):
            continue
        which = f": {next(iter(metrics.values()))}" if several and len(panel.metrics) > 1 else ""
        svg = figures.lines(drawn, title=panel.title + which, x="optimizer step", y=panel.unit, level=panel.level)
        found.append(Figure(svg, panel.said))
    return [Heading("Curves"), Text(f"Means {said}."), *found] if found else []


# --- evaluations and samples


def _evaluations(run: Content) -> list[Section]:
    found: list[Section] = []
    for told in run.evaluations:
        rows: list[list[Cell]] = []
        for name, figure in told["figures"].items():
            known = content.numbers(figure) if isinstance(figure, dict) else {}
            if "value" in known:
                bounded = "low" in known and "high" in known
                value = Interval(known["value"], known["low"], known["high"]) if bounded else known["value"]
                rows.append([str(name), value, int(known["n"]) if "n" in known else None])
        if rows:
            caption = f"{told.get('name', '')}, with 95 % intervals over n items"
            found.append(Table(["figure", "value", "n"], rows, caption=caption, by_row=True))
        notes = told.get("notes")
        found += [Bullets([str(note) for note in notes])] if isinstance(notes, list) and notes else []
        made = told.get("made")
        if isinstance(made, dict) and made:
            facts = Facts([(str(name), str(value)) for name, value in made.items()])
            found.append(Folded(f"How {told.get('name', 'it')} was made", [facts]))
    return [Heading("Evaluations"), *found] if found else []


def _compared_samples(run: Content) -> list[Section]:
    prompts = list(dict.fromkeys([*run.after, *run.before]))
    if not prompts:
        return []
    return [
        Heading("Samples"),
        Text("The most likely responses to the first held-out problems."),
        Samples([(prompt, run.before.get(prompt), run.after.get(prompt)) for prompt in prompts]),
    ]


# --- what was run


def _what_was_run(run: Content) -> list[Section]:
    config, environment = run.config, run.environment

    def options(section: str) -> str:
        inside = [(k.partition(".")[2], v) for k, v in config.items() if k.startswith(f"{section}.")]
        return ", ".join(f"{k} = {v}" for k, v in inside if k != "name" and v is not None)

    facts: list[tuple[str, str]] = [("state", run.state)]
    for section in ("algo", "divergence", "reward", "source", "target", "advantage", "kl", "scorer", "reference"):
        name = config.get(f"{section}.name")
        if name is not None:
            more = options(section)
            facts.append((section, f"{name} ({more})" if more else str(name)))
    facts += [(part, _place(config, part)) for part in ("model", "data")]
    steps = (
        f"{run.figures['steps']:,.0f}" if "steps" in run.figures else f"{run.steps[-1]['step']:g}" if run.steps else "0"
    )
    size = f"{steps}, of {config.get('train.prompts')} prompts each; learning rate {config.get('train.lr')}"
    spent = {k.partition("/")[2]: v for k, v in run.figures.items() if k.startswith("seconds/")}
    facts += [
        ("responses of a prompt", str(config.get("source.samples") or config.get("data.responses"))),
        ("optimizer steps", size),
        ("seed", str(config.get("run.seed"))),
        (
            "engine",
            f"{config.get('engine.name')}, {environment.get('ranks', '?')} rank(s) on {environment.get('device', '?')}",
        ),
    ]
    if spent:
        parts = ", ".join(f"{name} {value:,.1f} s" for name, value in spent.items())
        facts.append(("time in steps", parts))
    if "peak_memory_gb" in run.figures:
        facts.append(("peak memory", f"{run.figures['peak_memory_gb']:.2f} GB"))
    facts += [
        ("started", str(environment.get("started", "unknown"))),
        ("revision", str(environment.get("git") or "unknown")),
    ]
    versions = environment.get("versions")
    if isinstance(versions, dict):
        told = (f"{name} {version}" for name, version in versions.items() if version)
        facts.append(("versions", ", ".join(told)))
    found: list[Section] = [Heading("What was run"), Facts(facts)]
    command = environment.get("command")
    if isinstance(command, list) and command:
        found.append(Commands([written(command)]))
    told = "\n".join(f"{key}: {value}" for key, value in config.items())
    return [*found, Folded("The whole configuration", [Commands([told])])]


def written(command: Sequence[object]) -> str:
    """A command line as it is typed: the program by its name, whatever its place was."""
    program = ("python", "-m", "align_cli.worker") if str(command[0]).endswith("worker.py") else ("align",)
    return terminal.shell([*program, *map(str, command[1:])])


def _place(config: Mapping[str, object], part: str) -> str:
    """A model or dataset by its name and, where that does not say it, where it comes from; not the folders above."""
    name, path = config.get(f"{part}.name"), config.get(f"{part}.path")
    return str(name) if path in (None, "", name) else f"{name} ({path})"
