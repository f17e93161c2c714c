"""Where the time of a step goes with one copy of each prompt, and with one for each response: `scripts/bench --parts`.

A target asks for nine tenths of the token ratio. What a prompt's copies do not touch bounds what can be had: the head
reads response positions alone, the optimizer the weights, and a response attends to its prompt in either case. The
ratio of the operations that both kinds need says how much that is, before anything is measured. Steps of both kinds
take turns in one process, through align's own engine, and a machine that slows down slows both; then the parts are
timed alone on the same groups.

    blocks      the products of all layers, forward and both gradients
    attention   over the rows as they are
    head        from states to log-probabilities, and back
    update      clipping and AdamW
    rest        norms, rotations, activations, copies: the whole step without the others
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from align_cli import process
from benchmark import contenders, flops, groups, machine, plan, results, worker
from benchmark.__main__ import RESULTS, lengths_of, say
from benchmark.lengths import Lengths
from benchmark.plan import ALIGN, UNSHARED, Case
from benchmark.shapes import SHAPES

Record = dict[str, Any]
PARTS = ("blocks", "attention", "head", "update", "rest")
KINDS = {ALIGN: True, UNSHARED: False}  # whether a row holds a prompt once
BUDGET = 4096  # tokens of a micro-batch, as `engine.micro_tokens` on a CPU
LOGITS_MB = 256  # as `engine.logits_mb`


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench --parts", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
    parser.add_argument("--models", default="30M,135M", metavar="NAMES", help="of models (30M,135M)")
    counted = "processes of each case, with those of before (5)"
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help=counted)
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="steps of each kind in a process (3)")
    parser.add_argument("--name", default="parts", help="of the results (parts)")
    parser.add_argument(
        "--show", action="store_true", help="the table from the JSON that is there; nothing is measured"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    path = RESULTS / f"{given.name}.json"
    if given.show:
        say("\n".join(lines(results.read(path))))
        return 0
    cases = [
        case
        for name in given.models.split(",")
        for case in plan.sharing(SHAPES[name], groups=2, timed=given.pairs, repeats=given.repeats)
        if given.only in case.name
    ]
    data = _begun(path, given.pairs)
    there = {(run["case"], run["round"]) for run in data["steps"]}
    for number in range(given.repeats):
        for case in cases:
            if (case.name, number) in there:
                continue
            found = contenders.ask("benchmark.parts", job_of(case, given.pairs, number))
            data["steps"].append({"case": case.name, "round": number} | found)
            data["figures"] = figures(data)
            results.write(path, data)
            told = data["figures"][case.name]["ratio"]
            say(f"{case.name}, round {number + 1} of {given.repeats}: {told['median']:.3f}")
    data["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    results.write(path, data)
    say("\n".join(lines(data)))
    return 0


def _begun(path: Path, pairs: int) -> Record:
    """What the JSON holds already, if it is of the same code, machine and number of pairs; else nothing."""
    settings = {"threads": plan.THREADS, "pairs": pairs, "budget": BUDGET}
    if path.is_file():
        found = results.read(path)
        if (found["tree"], found["machine"], found["settings"]) == (machine.tree(), machine.machine(), settings):
            say(f"goes on from {path}: {len(found['steps'])} processes are there")
            return found
        say(f"{path} is of other code, another machine or another number of pairs: it is made anew")
    runs = {"settings": settings, "runs": [], "steps": []}  # `runs` are whole command lines, which these are not
    return {section: {} for section in results.SECTIONS} | results.begun("parts") | runs


def job_of(case: Case, pairs: int, number: int) -> Record:
    """What a process is told."""
    folder = contenders.model(case.shape.name)
    lengths = lengths_of(case)[: case.groups]
    return {"shape": case.shape.name, "folder": str(folder), "pairs": pairs, "round": number} | lengths.as_json()


def figures(data: Mapping[str, Any]) -> Record:
    """Of each case the ratio, pair by pair, and the seconds of each part of a step of either kind."""
    found: Record = {}
    for name in dict.fromkeys(run["case"] for run in data["steps"]):
        runs = [run for run in data["steps"] if run["case"] == name]
        ratios = [
            apart / shared
            for run in runs
            for shared, apart in zip(run["seconds"][ALIGN], run["seconds"][UNSHARED], strict=True)
        ]
        ceiling = runs[0]["token_ratio"]
        found[name] = {
            "ratio": results.spread(ratios),
            "token_ratio": ceiling,
            "operation_ratio": runs[0]["operation_ratio"],
            "target": 0.9 * ceiling,
            "reached": median(ratios) >= 0.9 * ceiling,
            "parts": {kind: _parts(runs, kind) for kind in KINDS},
        }
    return found


def _parts(runs: Sequence[Mapping[str, Any]], kind: str) -> Record:
    """Medians over the processes; the rest is what is left of the median step."""
    alone = {part: median(run["parts"][kind][part] for run in runs) for part in PARTS if part != "rest"}
    whole = median(seconds for run in runs for seconds in run["seconds"][kind])
    return alone | {"rest": whole - sum(alone.values()), "whole": whole}


def lines(data: Mapping[str, Any]) -> list[str]:
    """Markdown: a row for each case, each part's seconds with and without sharing."""
    told = [
        f"| model, lengths | ratio (min to max) | target | operations alone | {' | '.join(PARTS)} |",
        f"|---|---|---|---|{'---|' * len(PARTS)}",
    ]
    for name, found in data["figures"].items():
        ratio = found["ratio"]
        shared, apart = (found["parts"][kind] for kind in KINDS)
        parts = " | ".join(f"{shared[part]:.2f} / {apart[part]:.2f}" for part in PARTS)
        told.append(
            f"| {name.removesuffix(' [sharing]')} | **{ratio['median']:.2f}** ({ratio['min']:.2f} to "
            f"{ratio['max']:.2f}) | ≥ {found['target']:.3g} (90 % of {found['token_ratio']:.2f}) "
            f"| {found['operation_ratio']:.2f} | {parts} |"
        )
    return told


# --- in a process of its own


def measured(job: Record) -> Record:
    """Seconds of whole steps of both kinds, by turns, and of their parts."""
    import torch

    from align_cli.data.batches import Measured, split
    from align_cli.data.store import Group
    from align_cli.engine import Optimizer, TorchEngine
    from align_cli.models import recompute
    from align_cli.models.causal import Manner, Model, load_model
    from align_cli.models.head import Transform

    shape = SHAPES[job["shape"]]
    lengths = Lengths(np.array(job["prompts"]), np.array(job["responses"]))
    model = Model(name="hf", path=job["folder"], revision=None, rows="auto", head="auto", architecture=None)
    network = load_model(model, dtype=torch.bfloat16, bits=None)
    recompute.install(network)
    manner = Manner(flat=True, transform=Transform(), logits=LOGITS_MB << 20, sparing=True)
    adamw = Optimizer(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
    engine = TorchEngine(network, torch.device("cpu"), manner=manner, optimizer=adamw)
    written = [
        Group(
            index=place,
            prompt=each.prompt.astype(np.int32),
            responses=tuple(response.astype(np.int32) for response in each.responses),
            ratings=np.array(each.rewards, dtype=np.float32),
            where="",
        )
        for place, each in enumerate(groups.fill(lengths, vocabulary=shape.vocabulary, seed=plan.SEED))
    ]
    manners = {kind: replace(manner, share=share) for kind, share in KINDS.items()}
    batches: dict[str, list[Any]] = {}
    for kind, own in manners.items():
        parts = split(range(len(written)), own.lengths(Measured.of(written)), ranks=1, budget=BUDGET)[0]
        batches[kind] = [own.flatten([written[place] for place in part.groups]) for part in parts]

    def step(kind: str) -> None:
        engine.manner = manners[kind]
        for batch in batches[kind]:
            engine.backward(-engine.measure(batch)["policy"].mean() / 1000)
        engine.step(plan.LEARNING_RATE)

    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(plan.WARM + job["pairs"]):
        for kind in list(KINDS) if (number + job["round"]) % 2 == 0 else list(KINDS)[::-1]:
            begun = time.perf_counter()
            step(kind)
            if number >= plan.WARM:
                seconds[kind].append(time.perf_counter() - begun)
    alone = {kind: _alone(engine, network, batches[kind], shape) for kind in KINDS}
    tokens = {kind: sum(batch.input_ids.shape[1] for batch in batches[kind]) for kind in KINDS}
    needed = {kind: float(flops.group_flops(shape, lengths, shared=share).sum()) for kind, share in KINDS.items()}
    return {
        "seconds": seconds,
        "tokens": tokens,
        "parts": alone,
        "token_ratio": lengths.token_ratio(),
        "operation_ratio": needed[UNSHARED] / needed[ALIGN],
    }


def _alone(engine: Any, network: Any, batches: Sequence[Any], shape: Any) -> Record:
    """Seconds of the parts of a step, each the least of several times."""
    import torch
    from torch import nn

    from align_cli.models.attention import shared_attention
    from align_cli.models.head import HeadLogprobs, Transform

    found = dict.fromkeys(("blocks", "attention", "head"), 0.0)
    for batch in batches:
        tokens, kept = batch.input_ids.shape[1], len(batch.targets)
        for name, (rows, columns, count) in flops.matrices(shape).items():
            if name != "head":
                rate = flops.product_rate(tokens, columns, rows, torch.bfloat16, 0.1)
                found["blocks"] += count * 6 * tokens * columns * rows / rate

        projected = [
            torch.randn(1, heads, tokens, shape.head_width, dtype=torch.bfloat16, requires_grad=True)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        ]
        states = torch.randn(kept, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
        weight = network.get_output_embeddings().weight.detach().requires_grad_()

        def attend(given: Any = projected, layout: Any = batch.layout) -> None:
            query, key, value = given
            out, _ = shared_attention(nn.Identity(), query, key, value, None, align_layout=layout)
            torch.autograd.grad(out, given, torch.ones_like(out))

        def score(given: Any = (states, weight), targets: Any = batch.targets) -> None:
            out: Any = HeadLogprobs.apply(*given, None, targets, Transform(), LOGITS_MB << 20)
            torch.autograd.grad(out.sum(), given)

        found["attention"] += shape.layers * least(attend)
        found["head"] += least(score)

    def gradients() -> dict[str, Any]:
        return {name: torch.zeros_like(parameter) for name, parameter in engine.parameters.items()}

    def update() -> None:
        engine.gradients.update(gradients())
        engine.step(0.0)

    return found | {"update": max(0.0, least(update) - least(gradients))}


def least(work: Callable[[], object], times: int = 4) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    work()
    found = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - begun)
    return found


if __name__ == "__main__":
    if len(sys.argv) == 3 and Path(sys.argv[1]).is_file():
        process.settle()  # as align does, before torch is there
        worker.write_result(measured(worker.read_job()))
    else:
        sys.exit(main(sys.argv[1:]))
