"""Composition by Hydra, checked against the code's own signatures.

Hydra chooses the parts and merges their YAML. What a part may be given is then read off the function or dataclass
that takes it: its keyword-only parameters are the keys, their annotations the types and ranges. Nothing in a
configuration names code to run: a part is found by its name under a fixed module.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from align_cli import paths
from align_cli.errors import UserError

Tree = dict[str, Any]

_RESOLVER = re.compile(r"\$\{[A-Za-z_.]+:")


def compose(command: str, overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> Tree:
    """The resolved configuration of `conf/<command>.yaml` under the user's overrides.

    Args:
        command: name of the primary configuration.
        overrides: in Hydra's grammar, without sweeps. A key that no part knows is let through here and refused by
            `check`, which can say what would be right.
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

    refuse_code(overrides)
    for folder in config_dirs:
        if not Path(folder).is_dir():
            raise UserError(f"--config-dir {folder}: no such folder.")
    groups = group_names(config_dirs)
    search = [f"file://{paths.recipes().parent}", *(f"file://{Path(folder).resolve()}" for folder in config_dirs)]
    lifted = [_lift(override, groups) for override in overrides]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(paths.conf()), version_base="1.3"):
            composed = hydra_compose(
                command, [f"hydra.searchpath=[{','.join(search)}]", *lifted], return_hydra_config=True
            )
            plain = hydra_compose(command, [f"hydra.searchpath=[{','.join(search)}]"], return_hydra_config=True)
        _refuse_hydra_node(OmegaConf.to_container(composed.hydra), OmegaConf.to_container(plain.hydra))
        OmegaConf.set_struct(composed, False)
        del composed["hydra"]
        _refuse_resolvers(OmegaConf.to_container(composed, resolve=False), "")
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, groups)) from error
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def group_names(config_dirs: Sequence[str] = ()) -> dict[str, list[str]]:
    """Each group of `conf/` (and of more folders) with its options."""
    groups: dict[str, list[str]] = {"recipes": []}
    for root in (paths.conf(), *(Path(folder) for folder in config_dirs)):
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            options = (path.stem for path in folder.glob("*.yaml"))
            groups[folder.name] = sorted({*groups.get(folder.name, []), *options})
    home = paths.recipes()
    groups["recipes"] = sorted(str(path.relative_to(home).with_suffix("")) for path in home.rglob("*.yaml"))
    return groups


def refuse_code(overrides: Sequence[str]) -> None:
    """Refuse overrides that would name code to run or change how Hydra itself works."""
    for override in overrides:
        key, _, value = override.partition("=")
        if "_target_" in override:
            raise UserError(f"{override}: '_target_' is not taken from the command line; parts are chosen by name.")
        if re.match(r"[+~]*hydra([./@]|$)", key):
            raise UserError(f"{override}: Hydra's own settings are fixed; callbacks and logging could run code.")
        if _RESOLVER.search(value):
            raise UserError(f"{override}: only plain references such as ${{algo.alpha}} are taken, no resolvers.")


def _refuse_resolvers(node: Any, where: str) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_":
                raise UserError(f"{where or 'configuration'}: '_target_' is not taken; parts are chosen by name.")
            _refuse_resolvers(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for value in node:
            _refuse_resolvers(value, where)
    elif isinstance(node, str) and _RESOLVER.search(node):
        raise UserError(f"{where}={node}: only plain references such as ${{algo.alpha}} are taken, no resolvers.")


def _refuse_hydra_node(composed: Any, plain: Any) -> None:
    ours = ("runtime", "overrides", "job", "searchpath")
    for key in composed:
        if key not in ours and composed[key] != plain[key]:
            raise UserError(
                f"hydra.{key} is set by a chosen file; Hydra's own settings are fixed, they could run code."
            )


def _lift(override: str, groups: Mapping[str, Sequence[str]]) -> str:
    """A value override that may also name an unknown key, so that `check` judges all keys at once."""
    key = override.partition("=")[0].lstrip("+").partition("@")[0]
    if override.startswith("~") or "=" not in override:
        return override
    bare = override.lstrip("+")
    return bare if key in groups else f"++{bare}"


def _explain(error: Exception, groups: Mapping[str, Sequence[str]]) -> str:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    text = text.replace("Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.", "").strip()
    missing = re.search(r"Could not find '(?P<group>[\w/]+?)/(?P<name>[^/']+)'", text)
    if missing and missing["group"].split("/")[0] in groups:
        group = missing["group"].split("/")[0]
        name = missing[0][len("Could not find '") + len(group) + 1 : -1]
        return (
            f"{group}={name}: no such choice.{did_you_mean(name, groups[group])} It can be {', '.join(groups[group])}."
        )
    return text


def did_you_mean(word: str, words: Sequence[str]) -> str:
    """A sentence with the nearest of `words`, or nothing."""
    near = get_close_matches(word, words, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def find(module: str, name: str, key: str) -> Callable[..., Any]:
    """The function `name` of a part: in `<module>.<name>` where there is such a module, else in `<module>` itself.

    Raises:
        UserError: there is none.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{key}.name={name}: a name of lower-case letters, digits and underscores would be right.")
    package = importlib.import_module(module)
    home = package
    if vars(package).get("__path__") is not None:
        try:
            home = importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError as error:
            raise UserError(f"{key}.name={name}: there is no {module}.{name}.") from error
    function = vars(home).get(name)
    if not callable(function):
        raise UserError(f"{key}.name={name}: there is no function {name} in {home.__name__}.")
    return function


def options(target: Callable[..., Any]) -> list[str]:
    """The keys that a function or dataclass takes: its keyword-only parameters."""
    return [p.name for p in inspect.signature(target).parameters.values() if p.kind is p.KEYWORD_ONLY]


def check(target: Callable[..., Any], node: Any, path: str, *, injected: Sequence[str] = ()) -> list[str]:
    """What is wrong with `node` as the options of `target`, a sentence for each problem.

    Args:
        target: function or dataclass; its keyword-only parameters are the schema.
        node: the section of the configuration.
        path: the section's key, for messages.
        injected: parameters that the program gives, not the configuration.
    """
    from pydantic import ConfigDict, ValidationError, create_model

    if not isinstance(node, Mapping):
        return [f"{path}={node}: a section with keys would be right."]
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    names = [name for name in options(target) if name not in injected]
    fields: dict[str, Any] = {name: (hints[name], ...) for name in names}
    schema = create_model("Options", __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields)
    try:
        schema.model_validate(dict(node))
    except ValidationError as error:
        return [_sentence(problem, names, path) for problem in error.errors(include_url=False)]
    return []


def _sentence(problem: Any, names: Sequence[str], path: str) -> str:
    key = str(problem["loc"][0]) if problem["loc"] else ""
    where = f"{path}.{key}"
    if problem["type"] == "extra_forbidden":
        keys = f"It takes {', '.join(names)}." if names else "It takes no options."
        return f"{where}: no such key.{did_you_mean(key, names)} {keys}"
    if problem["type"] == "missing":
        return f"{where} is missing."
    return f"{where}={problem['input']}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def build(target: Callable[..., Any], node: Mapping[str, Any], **injected: Any) -> Any:
    """`target` with the options of a checked `node`: a column function still waits for its columns.

    A function with positional parameters becomes a function of those columns; anything else is called.
    """
    given = {name: node[name] for name in options(target) if name in node} | injected
    positional = [p for p in inspect.signature(target).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return partial(target, **given) if positional else target(**given)
