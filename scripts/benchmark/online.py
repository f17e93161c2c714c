"""Learning from own samples, align and TRL side by side: `scripts/bench --online`.

First `generation.sample` beside transformers' `generate`, in one process; then training steps beside `RLOOTrainer`
and `GRPOTrainer`, in fresh alternating processes, from the same weights, prompts and scorer. TRL's micro-batch is
tried upwards until it gets slower. An interrupted benchmark starts anew.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmark import contenders, groups, plan, results
from benchmark.__main__ import ATTEMPTS, RESULTS, epoch_order, lengths_of, say
from benchmark.contenders import ROOT, WORK, Record
from benchmark.lengths import fixed
from benchmark.plan import ALIGN, TUNED, Case
from benchmark.shapes import SHAPES

BETA = {"rloo": 0.05, "grpo": 0.04}
KL = {"rloo": "kl.beta", "grpo": "algo.beta"}
PATTERN = "[05]$"  # a response that ends with one word of five is right
SAMPLING_TARGET = 0.9  # of generate's tokens per second
STEP_TARGET = 1.5  # times TRL's samples per second


@dataclass(frozen=True)
class OnlineCase(Case):
    """Steps of an online algorithm; `responses` are sampled of each prompt, those of the rows are not looked at.

    Attributes:
        algo: rloo or grpo.
        new_tokens: longest response.
        precision: of both sides' products.
    """

    algo: str = "rloo"
    new_tokens: int = 24
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.algo}, {self.shape.name}, {self.table.name}"

    @property
    def algorithm(self) -> str:
        return self.algo

    @property
    def samples(self) -> int:
        """Of an optimizer step."""
        return self.groups * self.responses


def cases(repeats: int) -> list[OnlineCase]:
    """The embedded world's model at 64 prompts of a step; a larger one at 16, where TRL is slow."""
    small = OnlineCase("online", SHAPES["world"], fixed(7, 24), 4, 64, 6, (ALIGN, TUNED), repeats, warm=2)
    large = replace(small, shape=SHAPES["30M"], table=fixed(100, 64), groups=16, timed=3, new_tokens=64)
    return [replace(case, algo=algo) for case in (small, large) for algo in ("rloo", "grpo")]


def overrides(case: OnlineCase) -> tuple[str, ...]:
    """What an online run adds to align's command line."""
    return (
        "source=rollout",
        f"source.samples={case.responses}",
        f"source.max_new_tokens={case.new_tokens}",
        "scorer=matches",
        f'scorer.pattern="{PATTERN}"',
        f"{KL[case.algo]}={BETA[case.algo]}",
        f"engine.precision={case.precision}",
        "eval.prompts=0",
        "track.every=1000000",
    )


def peer_job(case: OnlineCase, *, model: Path, rows: Path, micro_batch: int) -> Record:
    """What TRL's process is told.

    Args:
        micro_batch: samples that are trained on at a time.
    """
    return {
        "model": str(model),
        "rows": str(rows),
        "order": epoch_order(case.rows),
        "algorithm": case.algo,
        "groups": case.groups,
        "samples": case.responses,
        "new_tokens": case.new_tokens,
        "steps": case.steps,
        "micro_batch": micro_batch,
        "lr": plan.LEARNING_RATE,
        "beta": BETA[case.algo],
        "pattern": PATTERN,
        "precision": case.precision,
        "folder": "",
    }


def settings_of(case: OnlineCase) -> Record:
    """What `figures` and a reader need to know of a case."""
    return {
        "part": case.part,
        "model": case.shape.name,
        "lengths": case.table.name,
        "algorithm": case.algo,
        "groups_per_step": case.groups,
        "samples_per_prompt": case.responses,
        "new_tokens": case.new_tokens,
        "precision": case.precision,
        "beta": BETA[case.algo],
        "warm_steps": case.warm,
        "timed_steps": case.timed,
        "rounds": case.repeats,
    }


def figures(data: Mapping[str, Any]) -> Record:
    """Everything that the table shows, from the raw runs."""
    found: Record = {"steps": []}
    speeds = data["sampling"].get("tokens_per_second")
    if speeds:
        both = zip(speeds["align"], speeds["generate"], strict=True)
        found["sampling"] = {name: results.spread(values) for name, values in speeds.items()}
        found["sampling"]["ratio"] = results.spread([ours / theirs for ours, theirs in both])
    for name, settings in data["settings"]["cases"].items():
        told = results.ratios(data, name, TUNED)
        if told is None:
            continue
        row: Record = {"case": name, **told, "reached": told["speed"]["median"] >= STEP_TARGET}
        for contender in (ALIGN, TUNED):
            runs = results.counted(data, name, contender).values()
            each = [settings["samples_per_prompt"] * results.groups_per_second(run, settings) for run in runs]
            row[contender] = {
                "samples_per_second": results.spread(each),
                "peak_gb": results.spread([run["peak_bytes"] / 1e9 for run in runs]),
                "response_tokens": results.spread([run["response_tokens"] for run in runs]),
            }
        found["steps"].append(row)
    return found


def lines(data: Mapping[str, Any]) -> list[str]:
    """The table, as Markdown."""
    told = [
        "| | align | against | ratio (min to max) | target | peak memory ratio | |",
        "|---|---|---|---|---|---|---|",
    ]

    def spread(found: Mapping[str, Any]) -> str:
        return f"**{found['median']:.2f}** ({found['min']:.2f} to {found['max']:.2f})"

    def verdict(reached: bool) -> str:
        return "reached" if reached else "not reached"

    sampling = data["figures"].get("sampling")
    if sampling:
        told.append(
            f"| sampling | {sampling['align']['median']:,.0f} tokens/s | generate, "
            f"{sampling['generate']['median']:,.0f} tokens/s | {spread(sampling['ratio'])} | ≥ {SAMPLING_TARGET} | "
            f"| {verdict(sampling['ratio']['median'] >= SAMPLING_TARGET)} |"
        )
    for row in data["figures"]["steps"]:
        ours, theirs = row[ALIGN], row[TUNED]
        told.append(
            f"| {row['case']} | {ours['samples_per_second']['median']:.3g} samples/s, "
            f"{ours['peak_gb']['median']:.2f} GB | TRL tuned, {theirs['samples_per_second']['median']:.3g} samples/s, "
            f"{theirs['peak_gb']['median']:.2f} GB | {spread(row['speed'])} | ≥ {STEP_TARGET} "
            f"| {row['memory']['median']:.2f} | {verdict(row['reached'])} |"
        )
    computer, versions = data["machine"], data["versions"]
    told += [
        "",
        f"Ratios are of neighbouring runs. {computer['processor']}, {computer['cpus']} cores, "
        f"{computer['memory_gb']:.0f} GB; threads {data['settings']['threads']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, TRL {versions['trl']}; {data['started'][:10]}, "
        f"revision {data['git'][:12]}.",
    ]
    loaded = sum(run["disturbed"] and not run["void"] for run in data["runs"])
    if loaded:
        told.append(f"{loaded} runs were taken while other processes were at work: these figures are of no use.")
    return told


class Online:
    """A benchmark that writes its JSON after every run."""

    def __init__(self, path: Path, *, accept_load: bool) -> None:
        self.path = path
        self.accept_load = accept_load
        self.data: Record = results.begun(path.stem) | {
            "settings": {"threads": plan.THREADS, "learning_rate": plan.LEARNING_RATE, "models": {}, "cases": {}},
            "gate": {},
            "gemm": {},
            "sampling": {},
            "sweeps": {},
            "runs": [],
            "figures": {},
        }

    def save(self) -> None:
        self.data["figures"] = figures(self.data)
        results.write(self.path, self.data)

    def model(self, name: str) -> Path:
        """The folder of a model, made where it is not there."""
        folder = contenders.model(name)
        self.data["settings"]["models"][name] = asdict(SHAPES[name]) | {"weights": SHAPES[name].weights}
        return folder

    def sampling(self, *, rounds: int) -> None:
        """The embedded world's size: 64 prompts, 4 samples of each, 24 tokens."""
        job: Record = {"shape": "world", "prompt": 7, "new_tokens": 24, "prompts": 64, "responses": 4, "rounds": rounds}
        speeds = contenders.ask("benchmark.sampling", job | {"model": str(self.model("world"))})
        self.data["sampling"] = {**job, "tokens_per_second": speeds}
        self.save()
        say(f"sampling: {self.data['figures']['sampling']['ratio']['median']:.2f} of generate's speed")

    def steps(self, case: OnlineCase) -> None:
        """Round after round of both sides."""
        # a process begins with the peak memory of the one that started it, so this one stays small
        assert "torch" not in sys.modules
        model = self.model(case.shape.name)
        rows = WORK / "rows" / "online.jsonl"
        rows.parent.mkdir(parents=True, exist_ok=True)
        written = groups.fill(lengths_of(case), vocabulary=case.shape.vocabulary, seed=plan.SEED)
        groups.write_rows(groups.placed(written, epoch_order(case.rows)), rows)
        self.data["settings"]["cases"][case.name] = settings_of(case)
        micro_batch = self.tuned(case, model, rows)
        for number in range(case.repeats):
            for contender in case.contenders if number % 2 == 0 else case.contenders[::-1]:
                for attempt in range(ATTEMPTS):
                    found = self.one(case, contender, model, rows, micro_batch)
                    disturbed = found["others"] > contenders.MOST_LOAD
                    void = disturbed and not self.accept_load
                    place = {"case": case.name, "contender": contender, "round": number, "attempt": attempt}
                    self.data["runs"].append(place | {"void": void, "disturbed": disturbed} | found)
                    self.save()
                    if not void:
                        break

    def one(self, case: OnlineCase, contender: str, model: Path, rows: Path, micro_batch: int) -> Record:
        """One run.

        Raises:
            RuntimeError: it failed.
        """
        if contender == ALIGN:
            ended, told = contenders.run_align(case, ALIGN, model=model, rows=rows, more=overrides(case))
            if ended.code == 0:
                logged = (WORK / "run" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                told["response_tokens"] = json.loads(logged[-1])["rollout/length"]  # of the last step
        else:
            job = peer_job(case, model=model, rows=rows, micro_batch=micro_batch)
            ended, told = contenders.run_peer(job, tuning=None, module="benchmark.online_peer")
            told["tuning"] = f"micro-batch {micro_batch}"
        if ended.code != 0:
            raise RuntimeError(f"{contender} failed on {case.name}:\n{ended.tail(30)}")
        found = contenders.record_of(case, ended, told)
        speed = case.responses * results.groups_per_second(found, settings_of(case))
        say(
            f"{case.name} · {contender}: {speed:.3g} samples/s, {ended.peak_bytes / 1e9:.2f} GB, "
            f"{found['response_tokens']:.1f} tokens a response, {ended.seconds:.0f} s; others took {ended.others:.0%}"
        )
        return found

    def tuned(self, case: OnlineCase, model: Path, rows: Path) -> int:
        """The micro-batch with which TRL is fastest on a model, tried on its first case."""
        for sweep in self.data["sweeps"].values():
            if sweep["model"] == case.shape.name:
                return sweep["best"]
        tried: dict[str, float] = {}
        best, fastest, size = case.responses, 0.0, 4 * case.responses
        while size <= case.samples:
            found = self.one(case, TUNED, model, rows, size)
            tried[str(size)] = case.responses * results.groups_per_second(found, settings_of(case))
            if tried[str(size)] <= fastest:
                break
            best, fastest, size = size, tried[str(size)], 2 * size
        self.data["sweeps"][case.name] = {"model": case.shape.name, "samples_per_second": tried, "best": best}
        return best


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench --online", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="sampling, or cases whose name has this in it")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds of each case (3)")
    parser.add_argument("--name", default="online", help="of the results (online)")
    parser.add_argument(
        "--accept-load", action="store_true", help="keep runs that other processes disturb; the table then says so"
    )
    parser.add_argument("--show", action="store_true", help="the table from the JSON that is there; no run")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    path = RESULTS / f"{given.name}.json"
    if not given.show:
        chosen = [case for case in cases(given.repeats) if given.only in case.name]
        if not chosen and given.only != "sampling":
            say(f"--only {given.only}: no case has this in its name")
            return 2
        bench = Online(path, accept_load=given.accept_load)
        if given.only in ("", "sampling"):
            bench.sampling(rounds=15)
        for case in chosen:
            bench.steps(case)
        bench.data["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        bench.save()
    data = results.read(path)
    data["figures"] = figures(data)
    say("\n".join(["", *lines(data), "", str(path.relative_to(ROOT))]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
