"""The benchmark's command line: `scripts/bench`."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from benchmark import contenders, flops, gate, groups, machine, picture, plan, results, table
from benchmark.contenders import ROOT, WORK, Record, Tuning
from benchmark.lengths import Lengths, draw, shortened
from benchmark.plan import ALIGN, SHIPPED, TUNED, Case
from benchmark.shapes import SHAPES

RESULTS = ROOT / "scripts" / "benchmark" / "results"
ATTEMPTS = 3  # of a run that others disturb
# How much longer than at the measured rate of bf16 products a step is guessed to take, before any has been run.
GUESS = {ALIGN: 3.0, SHIPPED: 32.0, TUNED: 14.0}
STARTING = 14.0  # seconds of a run before its first step


def say(text: str) -> None:
    print(text, flush=True)


class Bench:
    """A benchmark that goes on from what its JSON holds already."""

    def __init__(self, path: Path, cases: Sequence[Case], *, fresh: bool, accept_load: bool) -> None:
        self.path = path
        self.cases = list(cases)
        self.accept_load = accept_load
        self.inputs: dict[str, tuple[Path, Path, list[int]]] = {}
        self.lengths: dict[str, Lengths] = {}
        self.truth: dict[str, str] = {}
        self.failed: set[tuple[str, str]] = set()
        self.data = self._start(fresh)

    def _start(self, fresh: bool) -> Record:
        tree = machine.tree()
        if self.path.is_file() and not fresh:
            found = results.read(self.path)
            if found["tree"] == tree and found["machine"] == machine.machine():
                say(f"goes on from {self.path}: {len(found['runs'])} runs are there")
                return found
            say(f"{self.path} is of other code or another machine: it is made anew")
        return results.begun(self.path.stem) | {
            "settings": {
                "threads": plan.THREADS,
                "precision": plan.PRECISION,
                "optimizer": {"name": "AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0},
                "max_grad_norm": 1.0,
                "learning_rate": plan.LEARNING_RATE,
                "beta": plan.BETA,
                "alpha": plan.ALPHA,
                "flops_per_group": flops.FORMULA,
                "models": {},
                "tables": {},
                "cases": {},
            },
            "gate": {},
            "gemm": {},
            "sweeps": {},
            "runs": [],
            "figures": {},
        }

    def save(self) -> None:
        self.data["figures"] = results.figures(self.data)
        results.write(self.path, self.data)

    # --- what both sides read

    def make(self) -> None:
        """Models and rows of all cases; align's token ids of every one of them are held to what was written."""
        settings = self.data["settings"]
        checks: list[tuple[Case, Record]] = []
        for case in self.cases:
            model = contenders.model(case.shape.name)
            lengths = lengths_of(case)
            written = groups.fill(lengths, vocabulary=case.shape.vocabulary, seed=plan.SEED)
            order = epoch_order(case.rows)
            rows = WORK / "rows" / f"{_slug(case.name)}.jsonl"
            rows.parent.mkdir(parents=True, exist_ok=True)
            groups.write_rows(groups.placed(written, order), rows)
            self.inputs[case.name], self.lengths[case.name] = (model, rows, order), lengths
            self.truth[case.name] = groups.digest_of(written)
            settings["models"][case.shape.name] = asdict(case.shape) | {"weights": case.shape.weights}
            settings["tables"][case.table.name] = asdict(case.table)
            settings["cases"][case.name] = results.case_settings(case, lengths)
            command = contenders.align_command(
                case, ALIGN, model=model, rows=rows, run_dir=WORK / "run" / "run", more=()
            )
            checks.append((case, {"settings": command[2:], "steps": case.steps}))
            told = settings["cases"][case.name]
            means = told["means_timed"]
            say(
                f"{case.name}: {case.groups} groups a step, P {means['prompt']:.0f}, R {means['response']:.0f} tokens, "
                f"token ratio {told['token_ratio']:.3f}, padding at 1 and 8 groups {told['padding']['1']:.2f} and "
                f"{told['padding']['8']:.2f}"
            )
        job = {"cases": [check for _, check in checks], "cache": str(WORK / "tokens")}
        for (case, _), found in zip(checks, contenders.ask("benchmark.tokens", job), strict=True):
            if found != self.truth[case.name]:
                raise gate.Disagreement(f"align reads other token ids than were written: {case.name}")
        say("align reads the token ids that were written, in the order of its steps")

    def reference(self, case: Case, tuning: Tuning, purpose: str) -> Path:
        """Where the tuned peer keeps what its first run precomputes, within this benchmark."""
        name = f"{_slug(case.name)}-{tuning.weights}-{_slug(self.data['started'])}-{purpose}.json"
        folder = WORK / "references"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    # --- before anything is timed

    def measure_products(self, *, brief: bool) -> None:
        """How fast this machine multiplies matrices of the models' shapes."""
        named = [name for name in dict.fromkeys(case.shape.name for case in self.cases) if name != "tiny"] or ["tiny"]
        before = self.data["gemm"] or {"rates": {}, "weighted": {}, "floor": {}}
        missing = [name for name in named if name not in before["weighted"]]
        if not missing:
            return
        job = {"shapes": missing, "tokens": 2048, "seconds": 0.1 if brief else 0.4, "square": 1024 if brief else 4096}
        rates = contenders.ask("benchmark.flops", job)
        # the share of positions whose logits are needed, at UltraFeedback's means and K = 2
        share = 610 / 795
        weighted: Record = {}
        for name in missing:
            weighted[name] = {
                setting: flops.weighted_rate(rates[setting][name], SHAPES[name], response_share=share)
                for setting in ("bf16", "fp32 highest", "fp32 medium")
            } | {"bf16 square": rates["bf16"]["square"]}
        self.data["gemm"] = {
            "rates": results.kept_rates(before["rates"], rates),
            "weighted": before["weighted"] | weighted,
            "floor": before.get("floor", {}) | measured_floor(missing, brief=brief),
            "response_share": share,
        }
        for name, found in weighted.items():
            told = ", ".join(f"{setting} {rate / 1e9:,.0f}" for setting, rate in found.items())
            say(f"products of {name}, GFLOP/s: {told}")
        self.save()

    def pass_gate(self, case: Case) -> None:
        """Hold both sides to each other on this case's model, lengths and K."""
        if case.name in self.data["gate"]:
            return
        rows = WORK / "rows" / "gate.jsonl"
        model = contenders.model(case.shape.name)
        written = groups.fill(lengths_of(case), vocabulary=case.shape.vocabulary, seed=plan.SEED)
        order = epoch_order(case.rows)
        groups.write_rows(groups.placed(written, order), rows)
        found = gate.hold(case, model=model, rows=rows, order=order)
        self.data["gate"][case.name] = found
        say(
            f"gate passed, {case.name}: losses of {gate.STEPS} steps differ by at most "
            f"{found['largest_difference']:.1e}, cosine of the first gradients {found['gradient_cosine']:.7f}"
        )
        self.save()

    # --- tuning the peer

    def tuning(self, case: Case) -> Tuning:
        """The fastest micro-batch for a case; tried once, and recorded.

        It is tried upwards until it gets slower, on the smallest model and its shortest case; one group at a time
        stays the fastest where groups are longer or the model is larger.
        """
        done = self.data["sweeps"]
        plain = Tuning(1, plan.WEIGHTS)
        if case.part != "target":
            return plain
        for sweep in done.values():
            if sweep["case"] == case.name or sweep["best"] == asdict(plain):
                return Tuning(**sweep["best"])
        tried: list[Record] = []
        best, speed = plain, 0.0
        for size in (1, 2, 4, 8):
            if case.groups % size:
                break
            fastest = self.try_tuning(case, replace(plain, micro_batch=size), tried)
            if fastest <= speed:
                break
            best, speed = replace(plain, micro_batch=size), fastest
        # for the record: other types, and keeping freed memory, which the peer's users are not told to do
        self.try_tuning(case, replace(best, weights=plan.OTHER_WEIGHTS), tried)
        self.try_tuning(case, replace(best, allocator=True), tried)
        done[case.name] = {"case": case.name, "tried": tried, "best": asdict(best)}
        say(f"TRL on {case.name} is fastest with {best.told()}")
        self.save()
        return best

    def try_tuning(self, case: Case, tuning: Tuning, tried: list[Record]) -> float:
        """Groups per second; 0 where it fails."""
        model, rows, order = self.inputs[case.name]
        job = contenders.peer_job(case, model=model, rows=rows, order=order, tuning=tuning)
        job["reference"] = str(self.reference(case, tuning, "sweep"))
        for _ in range(ATTEMPTS):
            ended, told = contenders.run_peer(job, tuning=tuning)
            if self.accept_load or ended.others <= contenders.MOST_LOAD:
                break
        found = contenders.record_of(case, ended, told)
        settings = self.data["settings"]["cases"][case.name]
        seen = {
            "groups_per_second": results.groups_per_second(found, settings) if ended.code == 0 else 0.0,
            "peak_bytes": ended.peak_bytes,
            "others": ended.others,
            "moved": told.get("moved"),
        }
        tried.append(asdict(tuning) | seen)
        say(f"  {tuning.told()}: {seen['groups_per_second']:.3g} groups/s, {ended.peak_bytes / 1e9:.2f} GB")
        return seen["groups_per_second"]

    # --- the runs

    def run(self) -> None:
        """Round after round of every case, in the order of the plan."""
        # a process begins with the peak memory of the one that started it, so this one stays small
        assert "torch" not in sys.modules
        for case in self.cases:
            for number in range(case.repeats):
                order = case.contenders if number % 2 == 0 else case.contenders[::-1]
                for contender in order:
                    if number not in results.counted(self.data, case.name, contender):
                        self.one(case, contender, number)
            self.save()

    def one(self, case: Case, contender: str, number: int) -> None:
        """A run that counts, if it can be had."""
        if (case.name, contender) in self.failed:
            return
        model, rows, order = self.inputs[case.name]
        peer = contender in (SHIPPED, TUNED)
        tuning = self.tuning(case) if contender == TUNED else None
        for attempt in range(ATTEMPTS):
            if peer:
                job = contenders.peer_job(case, model=model, rows=rows, order=order, tuning=tuning)
                if tuning is not None:
                    job["reference"] = str(self.reference(case, tuning, "rounds"))
                ended, told = contenders.run_peer(job, tuning=tuning)
            else:
                ended, told = contenders.run_align(case, contender, model=model, rows=rows)
            found = contenders.record_of(case, ended, told)
            if peer and ended.code == 0 and told["tokens"] != self.truth[case.name]:
                raise gate.Disagreement(f"TRL reads other token ids than were written: {case.name}")
            loaded = ended.others > contenders.MOST_LOAD
            void = loaded and not self.accept_load
            place = {"case": case.name, "contender": contender, "round": number, "attempt": attempt}
            self.data["runs"].append(place | {"void": void, "disturbed": loaded} | found)
            self.save()
            self.tell(case, contender, number, self.data["runs"][-1])
            if ended.code != 0:
                self.failed.add((case.name, contender))
                return
            if not void:
                return
            if tuning is not None and not told["reference_reused"]:  # its pass was disturbed too
                self.reference(case, tuning, "rounds").unlink()

    def tell(self, case: Case, contender: str, number: int, run: Record) -> None:
        label = f"{case.name} · {contender} · round {number + 1} of {case.repeats}"
        if run["code"] != 0:
            say(f"{label}: not available, it ended with {run['code']}: {run['said'].splitlines()[-1:]}")
            return
        speed = results.groups_per_second(run, self.data["settings"]["cases"][case.name])
        disturbed = f"; others took {run['others']:.0%}" if run["others"] > contenders.MOST_LOAD else ""
        void = ", void" if run["void"] else ""
        say(
            f"{label}: {speed:.3g} groups/s, {run['peak_bytes'] / 1e9:.2f} GB, {run['seconds']:.0f} s{disturbed}{void}"
            f" · about {self.left() / 60:.0f} minutes left"
        )

    def left(self) -> float:
        """Seconds that the runs still to be made are guessed to take."""
        total = 0.0
        for case in self.cases:
            settings = self.data["settings"]["cases"][case.name]
            for contender in case.contenders:
                if (case.name, contender) in self.failed:
                    continue
                done = results.counted(self.data, case.name, contender)
                missing = case.repeats - len(done)
                if missing > 0:
                    each = [run["seconds"] for run in done.values()] or [self.guess(case, contender, settings)]
                    total += missing * sum(each) / len(each)
        return total

    def guess(self, case: Case, contender: str, settings: Record) -> float:
        """Seconds of a run, from other runs of the contender, or from the rate of products."""
        name = case.shape.name
        rate = self.data["gemm"]["weighted"].get(name, {}).get("bf16", 2e10)
        ideal = settings["flops"] / rate
        kind = contender if contender in GUESS else ALIGN
        seen = [
            (run["seconds"] - STARTING) / (told["flops"] / rate)
            for run in self.data["runs"]
            if run["contender"] == kind and run["code"] == 0
            for told in (self.data["settings"]["cases"][run["case"]],)
            if told["model"] == name and told["part"] != "dataset"
        ]
        factor = max(1.0, sorted(seen)[len(seen) // 2]) if seen else GUESS[kind]
        return STARTING + factor * ideal


def measured_floor(models: Sequence[str], *, brief: bool) -> Record:
    """What bounds a step of each model from below on this machine (`benchmark.floor`)."""
    return contenders.ask("benchmark.floor", {"shapes": list(models), "seconds": 0.1 if brief else 2.0})


def lengths_of(case: Case) -> Lengths:
    """Every step has the table's means and the lengths of all others: what it needs has been touched before it."""
    step = draw(case.table, groups=case.groups, responses=case.responses, seed=plan.SEED)
    return Lengths(np.tile(step.prompts, case.steps), np.tile(step.responses, (case.steps, 1)))


def epoch_order(rows: int) -> list[int]:
    """The order in which align meets the rows of a file in its first epoch; `benchmark.tokens` holds align to it."""
    return np.random.default_rng((plan.SEED, 0)).permutation(rows).tolist()


def gate_cases(cases: Sequence[Case]) -> list[Case]:
    """Pairs on each model and K = 4 on the first, in few and short groups whose lengths differ as the case's do."""
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(case.shape.name, case)
    found: list[Case] = []
    for case in first.values():
        lengths = shortened(case.table, 4)
        for responses in (2,) if found else (2, 4):
            found.append(Case("gate", case.shape, lengths, responses, 2, gate.STEPS - 1, (), 1, warm=1))
    return found


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="align and TRL side by side, on this machine")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="the small model against TRL, two rounds")
    kind.add_argument("--smoke", action="store_true", help="tiny settings, to see that everything runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of each case (5; 2 with --quick)")
    parser.add_argument("--name", help="of the results (full, quick or smoke)")
    parser.add_argument("--fresh", action="store_true", help="make anew what is there already")
    parser.add_argument(
        "--accept-load", action="store_true", help="keep runs that other processes disturb; the table then says so"
    )
    parser.add_argument(
        "--floor", action="store_true", help="measure what bounds a step from below, for results of this machine"
    )
    parser.add_argument("--show", action="store_true", help="table and picture from the JSON that is there; no run")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    kind = "quick" if given.quick else "smoke" if given.smoke else "full"
    folder = WORK if given.smoke else RESULTS
    path = folder / f"{given.name or kind}.json"
    if given.floor and not given.show:
        data = results.read(path)
        if data["machine"] != machine.machine():
            say(f"{path} is of another machine, whose rates are not to be had here")
            return 2
        data["gemm"]["floor"] = measured_floor(list(data["gemm"]["weighted"]), brief=kind == "smoke")
        data["figures"] = results.figures(data)
        results.write(path, data)
    elif not given.show:
        make = {"quick": plan.quick, "smoke": plan.smoke, "full": plan.full}[kind]
        repeats = given.repeats or {"quick": 2, "smoke": 1, "full": 5}[kind]
        cases = [case for case in make(repeats) if given.only in case.name]
        if not cases:
            say(f"--only {given.only}: no case has this in its name")
            return 2
        bench = Bench(path, cases, fresh=given.fresh, accept_load=given.accept_load)
        try:
            bench.make()
            bench.measure_products(brief=kind == "smoke")
            say(f"about {bench.left() / 60:.0f} minutes")
            for case in gate_cases(cases):
                bench.pass_gate(case)
            bench.run()
        except gate.Disagreement as problem:
            say(f"the two sides do not compute the same thing, and no table is written: {problem}")
            return 1
        bench.data["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        bench.save()
    data = results.read(path)
    data["figures"] = results.figures(data)
    say("\n".join(["", *table.lines(data)]))
    written = [path]
    if results.has_curves(data):
        written.append(path.with_suffix(".svg"))
        picture.draw(data, written[-1])
    if given.readme:
        table.write_readme(ROOT / "README.md", data)
        written.append(ROOT / "README.md")
    say("\n".join(["", *map(str, written)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
