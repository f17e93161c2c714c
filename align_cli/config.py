"""Composition by Hydra, checked against the code's own signatures.

Hydra chooses the parts and merges their YAML. What a part may be given is then read off the function or dataclass
that takes it: its keyword-only parameters are the keys, their annotations the types and ranges. Nothing in a
configuration names code to run: a part is found by its name under a fixed module, or under the same module of a
package that the command line names (`--plugin`).
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

import yaml

from align_cli import paths
from align_cli.errors import UserError

Tree = dict[str, Any]

MISSING = "???"  # what a YAML says of a key that has to be given

_REFERENCE = re.compile(r"\$\{\.*[A-Za-z_][\w.]*\}")
_PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_TARGET = re.compile(r"(?<!\w)_target_(?!\w)")  # a folder may be called reaches_its_target_1


def compose(command: str, overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Tree:
    """The resolved configuration of `conf/<command>.yaml` under the user's overrides.

    Args:
        command: name of the primary configuration.
        overrides: in Hydra's grammar, without sweeps. A key that no part knows, and a value that has to be given and
            is not (`MISSING`), are let through here and refused by `check`, which judges all keys at once.
        config_dirs: more folders with groups, as `--config-dir` gives them.

    Raises:
        UserError: the overrides or files cannot be composed, or they would run code.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for folder in config_dirs:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder}: no such folder.")
    groups = group_names(config_dirs)
    refuse_code(overrides)
    problems = [_wrong_choice(override, command, groups) for override in parse(overrides)]
    if any(problems):
        raise UserError("\n".join(filter(None, problems)))
    search = [f"file://{Path(folder).resolve()}" for folder in config_dirs]
    search_path = f"hydra.searchpath=[{','.join(map(quoted, search))}]"
    lifted = [_lift(override, groups) for override in overrides]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(paths.conf()), version_base="1.3"):
            composed = hydra_compose(command, [search_path, *lifted], return_hydra_config=True)
        _refuse_hydra_node(OmegaConf.to_container(composed.hydra), _plain_hydra_node(command))
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        _refuse_code_inside(OmegaConf.to_container(composed, resolve=False), "")
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        raise UserError(_explain(error)) from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(tree, dict)
    problems = [
        f"{key}={shown(tree.get(key))}: give a section with keys."
        for key in _primary(command)
        if not isinstance(tree.get(key), Mapping)
    ]
    if problems:
        raise UserError("\n".join(problems))
    return {str(key): _at_home(value) for key, value in tree.items()}


def _at_home(section: Any) -> Any:
    """A section in whose paths ~ is the home folder: a shell leaves it as it is behind `key=`."""
    if not isinstance(section, Mapping):
        return section
    return {key: _expanded(value) if key in _PLACES else value for key, value in section.items()}


_PLACES = ("dir", "path", "paths", "model")


def _expanded(place: Any) -> Any:
    if isinstance(place, list):
        return [_expanded(each) for each in place]
    return os.path.expanduser(place) if isinstance(place, str) else place


@cache
def _plain_hydra_node(command: str) -> Any:
    """Hydra's own settings where no file and no override has touched them."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(paths.conf()), version_base="1.3"):
        plain = hydra_compose(command, return_hydra_config=True)
    return OmegaConf.to_container(plain.hydra)


def parse(overrides: Sequence[str]) -> list[Any]:
    """Hydra's reading of each override.

    Raises:
        UserError: names each one that cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    read: list[Any] = []
    problems: list[str] = []
    for override in overrides:
        try:
            read.append(parser.parse_override(override))
        except HydraException:
            key, _, value = override.partition("=")
            problems.append(
                f"{override}: cannot be read; in quotes for the shell and for align, {key}={quoted(value)!r}"
            )
    if problems:
        raise UserError("\n".join(problems))
    return read


def quoted(text: str) -> str:
    """A text that Hydra's grammar reads as it is, whatever is in it."""
    # a backslash before a quote, or at the end, stands for itself only when doubled
    doubled = re.sub(r"(\\+)('|$)", r"\1\1\2", text)
    return "'" + doubled.replace("'", "\\'") + "'"


def _wrong_choice(override: Any, command: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    """What is wrong with an override, as far as it can be seen from the groups alone."""
    key, line = override.key_or_group, override.input_line
    section, _, rest = key.partition(".")
    if not key or "/" in key or override.package is not None:
        near = did_you_mean(key.partition("/")[0], list(groups))
        return f"{line}: write key=value, such as algo=nca or train.lr=1e-6.{near}"
    if override.is_sweep_override():
        value = line.partition("=")[2]
        return f"{line}: several values need align train -m; for one text with a comma, quote it: \"{key}='{value}'\"."
    if rest == "name" and section in groups and section != "model":
        chosen = shown(None if override.is_delete() else override.value())
        return f"{line}: a name comes with its choice; use {section}={chosen}."
    if key not in groups:
        return None
    value = None if override.is_delete() else override.value()
    if isinstance(value, Mapping) or (value is None and key in _optional(command)):
        return None
    if key not in _groups_of(command):
        return f"{line}: align {command} has no such choice; it has {', '.join(_groups_of(command))}."
    if isinstance(value, str) and value in groups[key]:
        return None
    near = did_you_mean(str(value), groups[key])
    return f"{line}: no such choice.{near} {key} can be {', '.join(groups[key])}."


def _optional(command: str) -> set[str]:
    """The groups of which nothing may be chosen: the primary configuration says null, or optional."""
    chosen = [next(iter(entry.items())) for entry in _read(command)["defaults"] if isinstance(entry, dict)]
    free = {group for group, choice in chosen if choice is None or group.startswith("optional ")}
    return {group.removeprefix("optional ") for group in free}


def _groups_of(command: str) -> list[str]:
    """The groups that a command chooses from."""
    chosen = [next(iter(entry)) for entry in _read(command)["defaults"] if isinstance(entry, dict)]
    return [group.removeprefix("optional ") for group in chosen]


def _primary(command: str) -> list[str]:
    """The sections that stand in the primary configuration itself."""
    return [key for key, value in _read(command).items() if isinstance(value, Mapping)]


def _read(command: str) -> Tree:
    return yaml.safe_load((paths.conf() / f"{command}.yaml").read_text(encoding="utf-8"))


def group_names(config_dirs: Sequence[str] = ()) -> dict[str, list[str]]:
    """Each group of `conf/` with its choices, here and in more folders."""
    known = sorted(path.name for path in paths.conf().iterdir() if path.is_dir())
    roots = [paths.conf(), *map(Path, config_dirs)]
    found = {group: sorted({path.stem for root in roots for path in (root / group).glob("*.yaml")}) for group in known}
    found["scorer"] = [name for name in found["scorer"] if not is_example(name)]
    return found


def is_example(scorer: str) -> bool:
    """Whether a scorer is what an algorithm has by itself on a model and data, `ALGO-MODEL-DATA`, and no choice."""
    return scorer.count("-") >= 2 and (paths.conf() / "algo" / f"{scorer.partition('-')[0]}.yaml").is_file()


def refuse_code(overrides: Sequence[str]) -> None:
    """Refuse overrides that would name code to run or change how Hydra itself works."""
    problems: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if _TARGET.search(override):
            problems.append(f"{override}: '_target_' is not taken from the command line; parts are chosen by name.")
        elif re.match(r"[+~'\"\s]*hydra\b", key):
            problems.append(f"{override}: Hydra's own settings are fixed; callbacks and logging could run code.")
        elif "${" in key or "${" in _REFERENCE.sub("", value):
            problems.append(f"{override}: only plain references such as ${{algo.alpha}} are taken, no resolvers.")
    if problems:
        raise UserError("\n".join(problems))


def _refuse_code_inside(node: Any, where: str) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_":
                raise UserError(f"{where or 'configuration'}: '_target_' is not taken; parts are chosen by name.")
            _refuse_code_inside(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for value in node:
            _refuse_code_inside(value, where)
    elif isinstance(node, str) and "${" in _REFERENCE.sub("", node):
        raise UserError(f"{where}={node}: only plain references such as ${{algo.alpha}} are taken, no resolvers.")


def _refuse_hydra_node(composed: Any, plain: Any) -> None:
    ours = ("runtime", "overrides", "job", "searchpath")
    told = ("override_dirname", "name", "config_name")
    for key in composed:
        before, after = (
            {k: v for k, v in node[key].items() if k not in told} if key == "job" else node[key]
            for node in (plain, composed)
        )
        if (key == "job" or key not in ours) and before != after:
            raise UserError(
                f"hydra.{key} is set by a chosen file; Hydra's own settings are fixed, they could run code."
            )


def _lift(override: str, groups: Mapping[str, Sequence[str]]) -> str:
    """A value override that may also name an unknown key, so that `check` judges all keys at once."""
    if override.startswith("~"):
        return override
    bare = override.lstrip("+")
    key, _, value = bare.partition("=")
    if key in groups and value.strip().lower() == "null":
        return f"~{key}"
    return bare if key in groups else f"++{bare}"


def _explain(error: Exception) -> str:
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not YAML: {error.problem}."
    text = re.split(r"Config search path:|Set the environment variable HYDRA_FULL_ERROR", str(error))[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    unknown = re.match(r"Interpolation key '(.*)' not found", lines[0])
    if isinstance(error, OmegaConfBaseException) and unknown:
        return (
            f"{error.full_key}=${{{unknown[1]}}}: there is no {unknown[1]}. Give it a value of its own, as "
            f"{error.full_key}=VALUE, or use another choice."
        )
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {lines[0]}." if error.full_key else f"{lines[0]}."
    return " ".join(lines)


def shown(value: object) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """A sentence with the nearest of `words`, or nothing."""
    near = get_close_matches(word, words, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


# The packages of `--plugin`, in which parts are looked for after our own. It is the process's, not a
# configuration's: a configuration, which may come from anyone, must not name code.
_plugins: list[str] = []


def use(packages: Sequence[str]) -> None:
    """Look for parts in these packages, too: `<package>.losses.<name>` beside `align_cli.losses.<name>`.

    A package is looked for where Python finds packages, and then in the working directory.

    Raises:
        UserError: there is no such package.
    """
    if packages and os.getcwd() not in sys.path:  # a console script's path begins with its own folder instead
        sys.path.append(os.getcwd())
    for package in packages:
        try:
            spec = importlib.util.find_spec(package) if _PACKAGE.fullmatch(package) else None
        except ModuleNotFoundError:  # what it would lie in is no package
            spec = None
        if spec is None:
            raise UserError(
                f"--plugin {package}: there is no such package here, among the installed ones, or on PYTHONPATH."
            )
        if spec.submodule_search_locations is None:
            raise UserError(
                f"--plugin {package}: it is a single file; make it a folder {package.replace('.', '/')} with a module "
                "for each kind of part in it, such as losses/mine.py."
            )
    _plugins[:] = packages


def plugins() -> list[str]:
    """The arguments that make another process find the same parts."""
    return [part for package in _plugins for part in ("--plugin", package)]


def find(module: str, name: str, key: str, *, function: str | None = None, told: str = "name") -> Callable[..., Any]:
    """The function of a part: in `<module>.<name>` where `module` is a package, else in `module` itself.

    Args:
        module: of ours; the same module of a plugin is looked at next.
        name: of the part.
        key: the group, for messages.
        function: what the function is called; None: as the part.
        told: the key under `key` that names the part.

    Raises:
        UserError: there is none.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{key}.{told}={shown(name)}: use lower-case letters, digits and underscores.")
    part = module.partition(".")[2]
    for root in ("align_cli", *_plugins):
        home = _home(f"{root}.{part}", name)
        found = None if home is None else vars(home).get(function or name)
        # what a module has imported from elsewhere is no part
        if inspect.isfunction(found) and found.__module__.startswith(f"{root}."):
            return found
    where = ", ".join(f"{root}.{part}" for root in ("align_cli", *_plugins))
    raise UserError(
        f"{key}.{told}={name}: there is no function {function or name} for it in {where}; --plugin PACKAGE names a "
        "package of your own."
    )


def sources(function: Callable[..., Any]) -> list[Path]:
    """The files that a part is made of: its own, and of a plugin's all of the plugin's package."""
    own = Path(inspect.getfile(function))
    root = function.__module__.partition(".")[0]
    package = Path(inspect.getfile(importlib.import_module(root)))
    if root == __package__ or package.name != "__init__.py":
        return [own]
    return sorted(package.parent.rglob("*.py"))


def _home(module: str, name: str) -> Any:
    """The module that a part is in; None where there is none."""
    if module.startswith("align_cli."):
        package = importlib.import_module(module)
    else:
        root = module.rpartition(".")[0]
        importlib.import_module(root)
        if importlib.util.find_spec(module) is None:
            return None
        package = importlib.import_module(module)
    if vars(package).get("__path__") is None:
        return package
    target = f"{module}.{name}"
    return importlib.import_module(target) if importlib.util.find_spec(target) is not None else None


def options(target: Callable[..., Any]) -> list[str]:
    """The keys that a function or dataclass takes: its keyword-only parameters."""
    return [p.name for p in inspect.signature(target).parameters.values() if p.kind is p.KEYWORD_ONLY]


def check(
    target: Callable[..., Any],
    node: Any,
    path: str,
    *,
    injected: Sequence[str] = (),
    more: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """What is wrong with `node` as the options of `target`, a sentence for each problem.

    Args:
        target: function or dataclass; its keyword-only parameters are the schema.
        node: the section of the configuration.
        path: the section's key, for messages; empty for keys that stand in no section.
        injected: parameters that the program gives, not the configuration.
        more: keys that the section has beside the target's, with their annotations.
    """
    from pydantic import ConfigDict, ValidationError, create_model

    if not isinstance(node, Mapping):
        return [f"{path}={shown(node)}: give a section with keys."]
    hints = {**more, **get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)}
    names = [*more, *(name for name in options(target) if name not in injected)]
    fields: dict[str, Any] = {name: (hints[name], ...) for name in names}
    schema = create_model("Options", __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields)
    asked = [str(key) for key, value in node.items() if value == MISSING]
    problems = [f"{_dotted(path, key)} has to be given, as {_dotted(path, key)}=VALUE." for key in asked]
    try:
        schema.model_validate(dict(node))
    except ValidationError as error:
        found: dict[str, list[Any]] = {}
        for problem in error.errors(include_url=False):
            found.setdefault(str(problem["loc"][0]) if problem["loc"] else "", []).append(problem)
        problems += [_sentence(same, names, path) for key, same in found.items() if key not in asked]
    return problems


def _sentence(problems: Sequence[Any], names: Sequence[str], path: str) -> str:
    """A sentence on what is wrong with one key; where several types would do, there is a problem for each."""
    first, key = problems[0], str(problems[0]["loc"][0])
    where = _dotted(path, key) + "".join(f"[{place}]" for place in first["loc"][1:] if isinstance(place, int))
    if first["type"] == "extra_forbidden":
        keys = f"It takes {', '.join(names)}." if names else "It takes no options."
        return f"{where}: no such key.{did_you_mean(key, names)} {keys}"
    if first["type"] == "missing":
        return f"{where} is missing."
    lead = "input should be "
    told = dict.fromkeys(problem["msg"][0].lower() + problem["msg"][1:] for problem in problems)
    text, *others = told
    return f"{where}={shown(first['input'])}: {' or '.join([text, *(o.removeprefix(lead) for o in others)])}."


def _dotted(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def build(target: Callable[..., Any], node: Mapping[str, Any], **injected: Any) -> Any:
    """`target` with the options of a checked `node`: a column function still waits for its columns.

    A function with positional parameters becomes a function of those columns; anything else is called.
    """
    given = {name: node[name] for name in options(target) if name in node} | injected
    positional = [p for p in inspect.signature(target).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return partial(target, **given) if positional else target(**given)
