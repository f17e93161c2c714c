"""What align makes of the rows, in a process of its own: the token ids of each step's groups, as a digest."""

from pathlib import Path
from typing import Any

from align_cli import config, reading
from align_cli.data.batches import members
from align_cli.data.store import prepare
from align_cli.models.causal import load_tokenizer
from benchmark import groups, worker


def digest(settings: list[str], *, cache: Path, steps: int) -> str:
    """Of the groups in the order in which a run with these settings meets them."""
    read = reading.read(config.compose("train", settings))
    tokenizer = load_tokenizer(read.model)
    store, _ = prepare(
        read.data,
        tokenizer,
        seed=read.run.seed,
        cache=cache,
        say=lambda _: None,
        pairwise=read.pairwise,
        strict=read.labelled,
        sampled=None,
    )
    train = read.train
    met: list[Any] = []
    for step in range(1, steps + 1):
        for index in members(store, step, prompts=train.prompts, seed=read.run.seed, together=train.together).tolist():
            group = store[index]
            met.append((group.prompt.tolist(), [response.tolist() for response in group.responses]))
    return groups.digest(met)


if __name__ == "__main__":
    job = worker.read_job()
    cache = Path(job["cache"])
    worker.write_result([digest(case["settings"], cache=cache, steps=case["steps"]) for case in job["cases"]])
