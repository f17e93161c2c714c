import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from align_cli import paths as where
from align_cli.errors import UserError
from align_cli.world import World, WorldPaths, digest, prepare

SMALL = World(
    name="addition",
    seed=0,
    digits=1,
    hidden=16,
    layers=1,
    heads=2,
    demonstrations=100,
    sft_steps=1,
    sft_prompts=4,
    sft_lr=1e-3,
    prompts=20,
    samples=2,
    temperature=1.0,
    max_new_tokens=120,
    held_out=10,
)


def no_training(demonstrations: Path, start: Path, to: Path, world: World) -> None:
    """A random model ends a response of 47 equally likely tokens within 120 with probability 0.92."""
    shutil.copytree(start, to)


def quiet(*_: object) -> None:
    pass


def made(cache: Path, world: World = SMALL) -> WorldPaths:
    return prepare(world, cache=cache, train_sft=no_training, say=quiet, progress=quiet)


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parts_share_no_problem(tmp_path: Path):
    world = made(tmp_path)
    samples, held_out, shown = (
        {row["prompt"] for row in rows(path)} for path in (world.samples, world.held_out, world.demonstrations)
    )
    assert len(held_out) == 10
    assert not samples & held_out
    assert not shown & (samples | held_out)
    assert len(shown) == 81 - 10 - 20
    assert len(rows(world.demonstrations)) == 100


def test_every_sample_ended_and_is_scored(tmp_path: Path):
    samples = rows(made(tmp_path).samples)
    assert 0 < len(samples) <= 20
    for row in samples:
        completions, rewards = row["completions"], row["rewards"]
        assert isinstance(completions, list)
        assert isinstance(rewards, list)
        assert len(completions) == len(rewards) == 2
        assert all(completions)


def test_problems_with_a_response_that_was_cut_are_left_out(tmp_path: Path):
    said: list[str] = []
    short = replace(SMALL, max_new_tokens=40)
    world = prepare(short, cache=tmp_path, train_sft=no_training, say=said.append, progress=quiet)
    left_out = 20 - len(rows(world.samples))
    # Two responses end within 40 of 47 equally likely tokens with probability 0.33, at least one of them with 0.82.
    assert 8 < left_out < 20
    assert any(line.startswith(f"{left_out} of 20 problems left out") for line in said)


def test_a_world_is_made_once_and_is_the_same_anywhere(tmp_path: Path):
    calls: list[Path] = []

    def counted(demonstrations: Path, start: Path, to: Path, world: World) -> None:
        calls.append(to)
        no_training(demonstrations, start, to, world)

    for _ in range(2):
        first = prepare(SMALL, cache=tmp_path / "a", train_sft=counted, say=quiet, progress=quiet)
    assert len(calls) == 1
    second = made(tmp_path / "b")
    for one, other in ((first.samples, second.samples), (first.held_out, second.held_out)):
        assert one.read_bytes() == other.read_bytes()
    assert made(tmp_path / "b", replace(SMALL, seed=1)).held_out.read_bytes() != second.held_out.read_bytes()


def test_of_two_at_once_one_makes_the_world_and_the_other_waits(tmp_path: Path):
    calls: list[Path] = []
    said: list[str] = []
    begun, finish = threading.Event(), threading.Event()

    def slow(demonstrations: Path, start: Path, to: Path, world: World) -> None:
        calls.append(to)
        begun.set()
        assert finish.wait(30)
        no_training(demonstrations, start, to, world)

    def hear(line: str) -> None:
        said.append(line)
        if "waiting" in line:
            finish.set()

    def run() -> None:
        prepare(SMALL, cache=tmp_path, train_sft=slow, say=hear, progress=quiet)

    first, second = threading.Thread(target=run), threading.Thread(target=run)
    first.start()
    assert begun.wait(30)
    second.start()
    first.join(60)
    second.join(60)
    assert len(calls) == 1
    assert sum("waiting" in line for line in said) == 1


def test_an_interrupted_world_is_made_again(tmp_path: Path):
    def killed(demonstrations: Path, start: Path, to: Path, world: World) -> None:
        to.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(SMALL, cache=tmp_path, train_sft=killed, say=quiet, progress=quiet)
    assert rows(made(tmp_path).samples)
    assert not list(tmp_path.rglob("*.partial"))


def test_the_name_of_a_world_follows_its_options():
    assert digest(SMALL) == digest(replace(SMALL)) != digest(replace(SMALL, prompts=21))


def test_more_problems_than_there_are_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="81 problems"):
        made(tmp_path, replace(SMALL, prompts=71))


def test_a_width_that_heads_do_not_divide_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="multiple of 2 x heads"):
        made(tmp_path, replace(SMALL, hidden=18))


def test_the_shipped_world_can_be_made():
    options = yaml.safe_load((where.conf() / "world" / "addition.yaml").read_text())
    world = World(**options)
    assert world.held_out + world.prompts < 8100
