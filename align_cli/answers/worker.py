"""Judges answers with math-verify, a line of JSON each: `python -I worker.py MEMORY_MB`.

Its own time limits are switched off: they need signals, and whoever asks keeps the time and kills this process.
"""

import json
import resource
import sys
from typing import Any


def judged(gold: str, answer: str, tolerance: float) -> str:
    """right, wrong, or unread where math-verify finds nothing in the answer."""
    from math_verify import parse, verify

    def read(text: str) -> list[Any]:
        boxed = "\\boxed{" + text + "}"
        return parse(boxed, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    right, given = read(gold), read(answer)
    if not given:
        return "unread"
    if verify(right, given, timeout_seconds=None):  # pyright: ignore[reportArgumentType]
        return "right"
    if tolerance and right:
        target, found = float(right[0]), float(given[0])
        if abs(found - target) <= tolerance * abs(target):
            return "right"
    return "wrong"


def main() -> None:
    judged("1", "1", 0.0)  # imports, grammars and caches
    megabytes = int(sys.argv[1])
    limits = {resource.RLIMIT_AS: megabytes << 20, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        hardest = resource.getrlimit(limit)[1]
        value = value if hardest == resource.RLIM_INFINITY else min(value, hardest)
        resource.setrlimit(limit, (value, value))
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            print(judged(asked["gold"], asked["answer"], asked["tolerance"]), flush=True)
        except (RecursionError, ArithmeticError, TypeError, ValueError, AttributeError):
            # math-verify and sympy let these through from expressions that mean nothing
            print("wrong", flush=True)


if __name__ == "__main__":
    main()
