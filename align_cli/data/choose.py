"""Which responses of a prompt are kept."""

import hashlib
import json
import random
from dataclasses import replace

from align_cli.data.options import Keep, Pairs
from align_cli.data.records import Record


def choose(record: Record, *, responses: int | None, keep: Keep, pairs: Pairs | None, seed: int) -> Record | None:
    """`record` with the responses that are kept; None where a preference is wanted and all ratings tie.

    The random choice depends on the record's content and the seed alone, not on its place in the data.

    Args:
        responses: at most this many are kept; None keeps all.
        keep: best_and_random (the best, then random others in the data's order), first, or random.
        pairs: best_random or best_worst keep two, the best and one that is strictly worse; all keeps every
            response of a record with a preference; None asks for no preference.
        seed: of the random choice.
    """
    kept = list(range(len(record.ratings)))
    fewer = responses is not None and len(kept) > responses
    if pairs is None and not fewer:
        return record
    draw = random.Random(content(record, seed))
    if responses is not None and fewer:
        kept = first_choice(record, responses, keep, draw)
    if pairs is None:
        return taken(record, kept)
    best = max(kept, key=lambda k: record.ratings[k])  # the first of several
    worse = [k for k in kept if record.ratings[k] < record.ratings[best]]
    if not worse:
        return None
    if pairs == "best_random":
        kept = [best, draw.choice(worse)]
    if pairs == "best_worst":
        kept = [best, min(worse, key=lambda k: record.ratings[k])]
    return taken(record, kept)


def first_choice(record: Record, responses: int, keep: Keep, draw: random.Random) -> list[int]:
    """The responses to keep, before any pairing."""
    everything = range(len(record.ratings))
    if keep == "first":
        return list(everything[:responses])
    if keep == "random":
        return sorted(draw.sample(everything, responses))
    best = max(everything, key=lambda k: record.ratings[k])
    others = [k for k in everything if k != best]
    return [best, *sorted(draw.sample(others, responses - 1))]


def taken(record: Record, kept: list[int]) -> Record:
    """The record with these responses only."""
    return replace(
        record,
        responses=tuple(record.responses[k] for k in kept),
        ratings=tuple(record.ratings[k] for k in kept),
    )


def content(record: Record, seed: int) -> int:
    """A number that depends on a record's prompt, responses and a seed."""
    prompt = record.prompt if isinstance(record.prompt, str) else list(record.prompt)
    text = json.dumps([seed, prompt, record.responses])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
