"""Shell completion: `eval "$(align -sc install=bash)"` once, then TAB completes commands, groups and keys."""

import os
from pathlib import Path

from align_cli import exits, recipe, terminal
from align_cli.commands import COMMANDS
from align_cli.config import group_names
from align_cli.errors import UserError

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
    raise UserError('completion: eval "$(align -sc install=bash)" would be right.')


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
    if command in ("compare", "report"):
        return [name for name in words_for(command, word) if name.startswith(word)]
    groups = group_names()
    if command in ("show", "cp", "ls"):
        known = {**groups, "recipes": list(recipe.names())}
        names = list(known) if command == "ls" else [f"{g}/{o}" for g, options in known.items() for o in options]
        return [name for name in names if name.startswith(word)]
    if command == "reproduce":
        names = [*recipe.names(), *(f"{key}=" for key in ("scale", "seeds", "jobs", "dir")), "--plan", "--list"]
        return [name for name in names if name.startswith(word)]
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


def words_for(command: str, word: str) -> list[str]:
    """Options of compare or report, the usual figures, and the folders that a word may become."""
    from align_cli.commands import compare, report
    from align_cli.comparison import METRICS

    options = {"compare": compare.OPTIONS, "report": report.OPTIONS}[command]
    done, comma, _ = word.rpartition(",")
    figures = [f"{done}{comma}{name}" if comma else f"metric={name}" for name in METRICS]
    return [*options, *(figures if word.startswith("metric=") else []), *folders(word)]


def folders(word: str) -> list[str]:
    """The folders that a word may become."""
    above = Path(word.rpartition("/")[0] or ("/" if word.startswith("/") else "."))
    return sorted(str(path) for path in above.glob("*") if path.is_dir() and not path.name.startswith("."))


def keys(primary: str) -> list[str]:
    """The keys of a primary configuration, those of its sections with dots."""
    import yaml

    from align_cli import paths

    tree = yaml.safe_load((paths.conf() / f"{primary}.yaml").read_text(encoding="utf-8"))
    sections = {name: value for name, value in tree.items() if isinstance(value, dict)}
    own = [name for name in tree if name not in sections and name != "defaults"]
    return [*own, *(f"{section}.{key}" for section, values in sections.items() for key in values)]
