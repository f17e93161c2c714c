"""Responses for a task of lm-eval: align beside lm-eval's own model of transformers, `scripts/bench --evaluation`.

The same questions, weights, batch and greedy responses, in one process and one thread, by turns. What counts is the
time of the processor, which other work on the machine changes little. align's store of responses is empty in every
round. Both sides' responses are compared, and have to be the same.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark import results
from benchmark.__main__ import RESULTS, say

Record = dict[str, Any]
TARGET = 1.0  # of lm-eval's speed
SIZES = {"small": (128, 4), "larger": (320, 6)}  # width and layers


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench --evaluation", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--questions", type=Path, metavar="FILE", help="JSON lines with `question`, as GSM8K's")
    parser.add_argument("--count", type=int, default=64, metavar="N", help="of questions (64)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="sequences generated at a time (16)")
    parser.add_argument("--new-tokens", type=int, default=48, metavar="N", help="longest response (48)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (5)")
    return parser.parse_args(arguments)


def questions(path: Path | None, count: int) -> list[str]:
    """Questions from a file, or made up with lengths like GSM8K's: about 235 characters, from 80 to 600."""
    if path is not None:
        lines = path.read_text(encoding="utf-8").splitlines()[:count]
        return [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]
    rng = random.Random(0)
    lengths = [min(600, max(80, round(rng.lognormvariate(5.4, 0.4)))) for _ in range(count)]
    return [f"Question: {''.join(rng.choices('etaoin shrdlu', k=length))}\nAnswer:" for length in lengths]


def sides(model: Path, asked: Sequence[str], *, batch: int, new_tokens: int) -> dict[str, Callable[[], list[str]]]:
    """Both ways to have the responses."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from align_cli import subject
    from align_cli.evals.asking import Asked
    from align_cli.subject import Generate

    options = Generate(batch=batch, seed=0, precision="fp32", accelerator="cpu")
    ours = Asked(subject.find(str(model), options))
    backend: Any = HFLM
    theirs = backend(pretrained=ours.subject.model, tokenizer=ours.subject.tokenizer, batch_size=batch, device="cpu")
    settings = {"until": ["Question:"], "do_sample": False, "max_gen_toks": new_tokens}
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(text, settings), idx=place)
        for place, text in enumerate(asked)
    ]

    def align() -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ALIGN_CACHE"] = folder
            return ours.generate_until(requests, disable_tqdm=True)

    return {"align": align, "lm-eval": lambda: theirs.generate_until(requests, disable_tqdm=True)}


def alternate(both: dict[str, Callable[[], list[str]]], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of the processor that each side takes in each round, and the share of responses that are the same.

    Who begins alternates, and a first round is thrown away.
    """
    spent: dict[str, list[float]] = {name: [] for name in both}
    found: dict[str, list[str]] = {}
    for number in range(rounds + 1):
        for name in list(both) if number % 2 == 0 else list(both)[::-1]:
            begun = time.process_time()
            found[name] = both[name]()
            if number > 0:
                spent[name].append(time.process_time() - begun)
    pairs = list(zip(*found.values(), strict=True))
    return spent, sum(one == other for one, other in pairs) / len(pairs)


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    import torch
    from transformers.utils import logging

    from align_cli.models import tiny

    logging.disable_progress_bar()
    os.environ["LMEVAL_LOG_LEVEL"] = "ERROR"
    torch.set_num_threads(1)
    asked = questions(given.questions, given.count)
    alphabet = "".join(sorted(set("".join(asked))))
    data: Record = (
        {section: {} for section in results.SECTIONS}
        | results.begun("evaluation")
        | {
            "settings": {key: value.name if isinstance(value, Path) else value for key, value in vars(given).items()},
            "runs": [],  # each side in a process of its own, which these are not
            "responses": [],
        }
    )
    for name, (hidden, layers) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            longest = max(map(len, asked)) + given.new_tokens + 8
            shape = {"hidden": hidden, "layers": layers, "heads": hidden // 32, "positions": longest, "seed": 0}
            tiny.build(Path(folder), alphabet=alphabet, **shape)
            both = sides(Path(folder), asked, batch=given.batch, new_tokens=given.new_tokens)
            spent, same = alternate(both, given.repeats)
        data["responses"].append({"case": name, **shape, "seconds": spent, "same": same})
    data["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    data["figures"] = figures(data)
    results.write(RESULTS / "evaluation.json", data)
    say("\n".join(lines(data)))
    return 0


def figures(data: Mapping[str, Any]) -> Record:
    """Of each model how fast align was, as a multiple of lm-eval's speed in the same round."""
    found: Record = {}
    for run in data["responses"]:
        pairs = zip(run["seconds"]["align"], run["seconds"]["lm-eval"], strict=True)
        speed = results.spread([theirs / ours for ours, theirs in pairs])
        found[run["case"]] = {"speed": speed, "reached": speed["median"] >= TARGET}
    return found


def lines(data: Mapping[str, Any]) -> list[str]:
    """A sentence for each model."""
    told: list[str] = []
    for run in data["responses"]:
        figure = data["figures"][run["case"]]
        speed, verdict = figure["speed"], "reached" if figure["reached"] else "not reached"
        told.append(
            f"{run['case']} ({run['hidden']} wide, {run['layers']} layers): {speed['median']:.2f} "
            f"({speed['min']:.2f} to {speed['max']:.2f}) of lm-eval's speed, {verdict}; "
            f"{run['same']:.0%} of the responses are the same"
        )
    return told


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
