"""The embedded world: a tiny language model that can add a little, and scored samples of it.

A random-initialised model imitates demonstrations of mixed quality (`align_cli.data.toy`); the result is the model
that alignment starts from, and its own scored responses are the data. Everything follows from the options and their
seed, and is made once: a folder in the cache, named by what it was made from, that appears when it is complete.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_cli import generation
from align_cli.data import toy
from align_cli.errors import UserError
from align_cli.models import tiny
from align_cli.ranges import Count, Positive, WholeNumber

BATCH = 512  # sequences generated at a time
POSITIONS = 128  # longest sequence of the model, in tokens
MADE_BY = (toy.__file__, tiny.__file__, generation.__file__, __file__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The `world` section: the size of the task, of the model, and of its training.

    Attributes:
        name: the task; there is one.
        seed: of problems, demonstrations, weights and samples.
        digits: of each of the two numbers to add.
        hidden, layers, heads: the model.
        demonstrations: to imitate, drawn from the mixture of behaviours.
        sft_steps: optimizer steps of the imitation.
        sft_prompts: demonstrations of one such step.
        sft_lr: largest learning rate of the imitation.
        prompts: problems whose responses are sampled, for alignment.
        samples: responses to each of them.
        temperature: of the samples.
        max_new_tokens: longest response, stop token included.
        held_out: problems kept for evaluation, in no other part.
    """

    name: str
    seed: WholeNumber
    digits: Count
    hidden: Count
    layers: Count
    heads: Count
    demonstrations: Count
    sft_steps: Count
    sft_prompts: Count
    sft_lr: Positive
    prompts: Count
    samples: Count
    temperature: Positive
    max_new_tokens: Count
    held_out: Count


@dataclass(frozen=True, slots=True)
class WorldPaths:
    """What the world consists of.

    Attributes:
        model: folder of the model after imitation, with its tokenizer.
        samples: JSONL of prompt, completions, rewards.
        held_out: JSONL of prompt.
        demonstrations: JSONL of prompt, completions (one), rewards: what was imitated.
    """

    model: Path
    samples: Path
    held_out: Path
    demonstrations: Path


TrainSFT = Callable[[Path, Path, Path, World], None]
"""Trains on (demonstrations, model to start from, folder for the result) as the world says."""


def digest(world: World) -> str:
    """What names a world: its options and the code that makes it. Spaces or comments in that code count, too."""
    content = hashlib.sha256(json.dumps(asdict(world), sort_keys=True).encode())
    for source in MADE_BY:
        content.update(Path(source).read_bytes())
    return content.hexdigest()[:16]


def paths(folder: Path) -> WorldPaths:
    """The parts of a world under `folder`."""
    return WorldPaths(
        folder / "model", folder / "samples.jsonl", folder / "held_out.jsonl", folder / "demonstrations.jsonl"
    )


def prepare(
    world: World, *, cache: Path, train_sft: TrainSFT, say: Callable[[str], None], progress: Progress
) -> WorldPaths:
    """The world's folder under `cache`, made if it is not there.

    Of several processes that ask at once, one makes it and the others wait for it. A process that is killed leaves
    nothing that a later one would take for a world.

    Raises:
        UserError: the task has fewer problems than the options ask for, or the model's width does not divide.
    """
    check(world)
    folder = cache / "world" / f"{world.name}-{digest(world)}"
    if folder.is_dir():
        return paths(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is making the embedded world; waiting for it ({lock.lock_file}).")
        lock.acquire()
    try:
        if not folder.is_dir():
            say(f"making the embedded world, once for these settings: {folder}")
            partial = Path(f"{folder}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(world, partial, train_sft=train_sft, say=say, progress=progress)
            os.rename(partial, folder)
    finally:
        lock.release()
    return paths(folder)


def check(world: World) -> None:
    """Refuse a world that cannot be made."""
    wanted, there = world.held_out + world.prompts + 1, (9 * 10 ** (world.digits - 1)) ** 2
    if wanted > there:
        raise UserError(
            f"world.held_out={world.held_out} world.prompts={world.prompts}: there are {there} problems of "
            f"world.digits={world.digits}, and one must be left to imitate. Ask for fewer, or for more digits."
        )
    if world.hidden % (2 * world.heads):
        raise UserError(
            f"world.hidden={world.hidden} world.heads={world.heads}: hidden must be a multiple of 2 x heads."
        )


def make(world: World, folder: Path, *, train_sft: TrainSFT, say: Callable[[str], None], progress: Progress) -> None:
    """Write the whole world into an empty folder."""
    to = paths(folder)
    stream = toy.problems(world.seed, world.digits)
    held_out = list(itertools.islice(stream, world.held_out))
    prompts = list(itertools.islice(stream, world.prompts))
    write(to.held_out, ({"prompt": prompt} for prompt in held_out))
    write(to.demonstrations, demonstrations(world, list(itertools.islice(stream, world.demonstrations))))
    tiny.build(
        folder / "start",
        alphabet=toy.ALPHABET,
        hidden=world.hidden,
        layers=world.layers,
        heads=world.heads,
        positions=POSITIONS,
        seed=world.seed,
    )
    train_sft(to.demonstrations, folder / "start", to.model, world)
    shutil.rmtree(folder / "start")
    rows, left_out = samples(world, to.model, prompts, progress)
    if left_out:
        say(f"{left_out} of {len(prompts)} problems left out: a response was empty or did not end.")
    if not rows:
        raise UserError(
            f"world.sft_steps={world.sft_steps}: every problem got an empty or unending response. "
            "Imitate for longer, or raise world.max_new_tokens."
        )
    write(to.samples, rows)


def demonstrations(world: World, prompts: list[str]) -> Iterable[toy.ToyRow]:
    """One demonstration each, until there are enough; where problems run out they come again, behaviour drawn anew."""
    rng = random.Random(f"demonstrations {world.seed}")
    for prompt in itertools.islice(itertools.cycle(prompts), world.demonstrations):
        response = toy.demonstrate(prompt, toy.behaviour(rng), rng)
        yield {"prompt": prompt, "completions": [response], "rewards": [toy.score(prompt, response)]}


def samples(world: World, model: Path, prompts: list[str], progress: Progress) -> tuple[list[toy.ToyRow], int]:
    """The model's scored responses, in the order of `prompts`, and how many prompts were left out.

    A prompt is left out if one of its responses is empty or was cut: as data, a response ends with a stop token, and
    none is to be forged.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    stops = generation.stops(network, tokenizer)
    drawn = generation.sample(
        network,
        [tokenizer(prompt)["input_ids"] for prompt in prompts],
        responses=world.samples,
        max_new_tokens=world.max_new_tokens,
        temperature=world.temperature,
        seeds=[(world.seed, index) for index in range(len(prompts))],
        batch=BATCH,
        pad_id=stops[0],
        eos_ids=stops,
    )
    kept: dict[int, toy.ToyRow] = {}
    for done, (index, responses) in enumerate(drawn, start=1):
        texts = tokenizer.batch_decode([each.tokens for each in responses], skip_special_tokens=True)
        if all(texts) and all(each.ended for each in responses):
            scores = [toy.score(prompts[index], text) for text in texts]
            kept[index] = {"prompt": prompts[index], "completions": texts, "rewards": scores}
        progress("sampling responses", done, len(prompts))
    return [kept[index] for index in sorted(kept)], len(prompts) - len(kept)


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
