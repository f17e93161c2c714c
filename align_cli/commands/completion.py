"""Shell completion: `eval "$(align -sc install=bash)"` once, then TAB completes commands, groups and keys."""

import os
import pkgutil
from collections.abc import Callable
from pathlib import Path

from align_cli import exits, terminal
from align_cli.commands import COMMANDS
from align_cli.config import group_names
from align_cli.errors import UserError
from align_cli.reproduction import loading, recipe

BASH = """_align_completion() {
    COMPREPLY=($(COMP_LINE="${COMP_LINE:0:$COMP_POINT}" align -sc query=bash))
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -F _align_completion align
"""
OF_MODELS = {  # commands that take a run or model first, and the groups of their configurations
    "evaluate": ("eval", "suite", "judge", "data", "algo", "scorer"),
    "sample": ("scorer",),
    "chat": (),
}


def main(argv: list[str]) -> int:
    """`-sc install=bash` prints what to evaluate; `-sc query=bash` answers for COMP_LINE."""
    if argv == ["install=bash"]:
        terminal.result(BASH.rstrip())
        return exits.DONE
    if argv == ["query=bash"]:
        terminal.result("\n".join(complete(os.environ.get("COMP_LINE", ""))))
        return exits.DONE
    raise UserError('completion: use eval "$(align -sc install=bash)".')


def complete(line: str) -> list[str]:
    """What may stand where the line ends."""
    words = line.split()
    word = "" if line.endswith(" ") or not words else words[-1]
    before = words if word == "" else words[:-1]
    if len(before) <= 1:
        return [name for name in COMMANDS if name.startswith(word)]
    command = before[1]
    if command == "cache":
        return [name for name in ("ls", "verify", "gc") if len(before) == 2 and name.startswith(word)]
    groups = group_names()
    if command in ("show", "cp", "ls"):
        known = {**groups, "recipes": list(loading.names())}
        names = list(known) if command == "ls" else [f"{g}/{o}" for g, options in known.items() for o in options]
        return [name for name in names if name.startswith(word)]
    if command in PLAIN:
        return [name for name in PLAIN[command](word) if name.startswith(word)]
    if command not in ("train", "score", "plan", "data", *OF_MODELS):
        return []
    primary = command if command in OF_MODELS else "train"
    if command in OF_MODELS:
        if len(before) == 2 or before[-1] == "--against":
            return [name for name in folders(word) if name.startswith(word)]
        if word.startswith("-"):
            return [name for name in ("--against",) if command == "chat" and name.startswith(word)]
        groups = {name: groups[name] for name in OF_MODELS[command]}
    else:
        groups = {name: options for name, options in groups.items() if name not in ("eval", "suite", "judge")}
    group, equals, choice = word.partition("=")
    if equals:
        done, _, last = choice.rpartition(",")
        lead = f"{group}={done}," if done else f"{group}="
        return [f"{lead}{option}" for option in groups.get(group, []) if option.startswith(last)]
    return [f"{name}=" for name in [*groups, *keys(primary)] if name.startswith(word)]


def of_compare(word: str) -> list[str]:
    """Options of compare, the usual figures, and folders."""
    from align_cli.commands import compare

    return [*compare.OPTIONS, *figures(word), *folders(word)]


def of_report(word: str) -> list[str]:
    """Options of report, the usual figures, and folders."""
    from align_cli.commands import report

    return [*report.OPTIONS, *figures(word), *folders(word)]


def of_reproduce(word: str) -> list[str]:
    """Recipes, keys and flags."""
    from align_cli.commands import reproduce

    scales = [f"scale={name}" for name in recipe.SCALES] if word.startswith("scale=") else []
    return [*loading.names(), *(f"{key}=" for key in reproduce.KEYS), *scales, *reproduce.FLAGS]


def of_study(word: str) -> list[str]:
    """The names of our studies, and keys."""
    from align_cli import studies

    return [*(module.name for module in pkgutil.iter_modules(studies.__path__)), "seed=", "out=", "--plugin"]


def of_verify(word: str) -> list[str]:
    """Algorithms and flags."""
    return [*group_names()["algo"], "--json", "--plugin", "--config-dir"]


def figures(word: str) -> list[str]:
    """What `metric=` may become, a name or several."""
    from align_cli.comparison import METRICS

    done, comma, _ = word.rpartition(",")
    return [f"{done}{comma}{name}" if comma else f"metric={name}" for name in METRICS if word.startswith("metric=")]


def folders(word: str) -> list[str]:
    """The folders that a word may become."""
    above = Path(word.rpartition("/")[0] or ("/" if word.startswith("/") else "."))
    return sorted(str(path) for path in above.glob("*") if path.is_dir() and not path.name.startswith("."))


# What may stand anywhere behind a command that has no configuration, given how the word begins.
PLAIN: dict[str, Callable[[str], list[str]]] = {
    "compare": of_compare,
    "report": of_report,
    "reproduce": of_reproduce,
    "study": of_study,
    "verify": of_verify,
    "export": folders,
}


def keys(primary: str) -> list[str]:
    """The keys of a primary configuration, those of its sections with dots."""
    import yaml

    from align_cli import paths

    tree = yaml.safe_load((paths.conf() / f"{primary}.yaml").read_text(encoding="utf-8"))
    sections = {name: value for name, value in tree.items() if isinstance(value, dict)}
    own = [name for name in tree if name not in sections and name != "defaults"]
    return [*own, *(f"{section}.{key}" for section, values in sections.items() for key in values)]
