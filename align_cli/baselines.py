"""Ratings of the starting model's own responses, which `reward=contrastive` holds a response against.

They are drawn and rated once for each prompt, before the first update, and kept on disk under a name made of all that
decides them, so that a resumed run, and another run from the same start, find them.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align_cli import cache, distributed, terminal
from align_cli.data.store import Group
from align_cli.raters import Unrated
from align_cli.references import Say
from align_cli.sources import Sampler

CHUNK = 1024  # prompts after which what was drawn is written
NUMBER = 2**31 - 1  # takes the place of a step's number in seeds

Ratings = NDArray[np.float32]


class Baselines:
    """The column `baselines`, as the source gives it.

    Args:
        found: (N,) ratings by the name of a prompt; those are missing that could not be rated.
    """

    def __init__(self, found: Mapping[str, Ratings]) -> None:
        self.found = found

    def __call__(self, prompts: Sequence[Group], number: int) -> list[Ratings | None]:
        return [self.found.get(name_of(group)) for group in prompts]


def name_of(group: Group) -> str:
    """Of a prompt, by its tokens."""
    return hashlib.blake2b(group.prompt.tobytes(), digest_size=16).hexdigest()


def prepare(
    sampler: Sampler, prompts: Iterable[Group], *, responses: int, seed: int, kept: Path, origin: Any, say: Say
) -> Baselines:
    """The ratings of all these prompts, those that are not on disk drawn from the policy; every rank calls it.

    Args:
        sampler: of the policy as it starts.
        prompts: of the run.
        responses: N of each.
        seed: of the samples.
        kept: folder of such ratings.
        origin: what decides the ratings beside prompt, N, seed and the sampler's options, as JSON.
    """
    options = {name: vars(sampler.options)[name] for name in ("temperature", "max_new_tokens", "missing_eos_penalty")}
    told = {"origin": origin, "responses": responses, "seed": seed, "options": options, "stop": sampler.ends}
    key = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()
    path = kept / f"{key}.npz"
    there = distributed.gather(_read(path) if distributed.rank() == 0 else {})[0]
    wanted = {name_of(group): group for group in prompts}
    missing = {name: group for name, group in wanted.items() if name not in there}
    say(
        f"{responses} baseline responses for each of {len(wanted):,} prompts: {len(wanted) - len(missing):,} found, "
        f"{len(missing):,} to draw"
    )
    # A prompt's seed is its name, so that its samples do not depend on its place in the data.
    asked = [replace(group, index=int(name[:12], 16)) for name, group in missing.items()]
    found, bad = dict(there), list[Unrated]()
    for start in range(0, len(asked), CHUNK):
        drawn = sampler.attempt(asked[start : start + CHUNK], (seed, NUMBER), samples=responses)
        found |= {name_of(each): each.ratings for each in drawn if isinstance(each, Group)}
        bad += [each for each in drawn if isinstance(each, Unrated)]
        if found and distributed.rank() == 0:
            _write(path, found)
        sampler.judge(bad, of=len(wanted))
        if start + CHUNK < len(asked):
            say(f"{start + CHUNK:,} of {len(asked):,} prompts have their baseline responses")
    sampler.spent.clear()
    return Baselines(found)


def _read(path: Path) -> dict[str, Ratings]:
    """What is on disk; nothing where there is no whole file."""
    if not path.is_file():
        return {}
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as there:
            found = dict(zip(there["names"].tolist(), there["ratings"], strict=True))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # damaged: what it held is drawn again
        return {}
    cache.touch(path)
    return found


def _write(path: Path, found: Mapping[str, Ratings]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, names=np.array(list(found)), ratings=np.stack(list(found.values())))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        cache.write(path, buffer.getvalue())
    except OSError as error:  # the run has them in memory
        terminal.warn(f"baseline ratings cannot be kept in {path}: {error.strerror}; another run draws them again")
