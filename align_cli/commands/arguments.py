"""Arguments: Hydra overrides and a few flags, for commands with a configuration; a parser for those without."""

import argparse
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from align_cli import config, paths, terminal
from align_cli.config import Tree
from align_cli.errors import UserError
from align_cli.secrets import refuse_secrets

SWITCHES = {"-m": "multirun", "--multirun": "multirun", "--cfg": "show_config", "--config": "show_config"}
FOLDERS, PLUGINS = "--config-dir", "--plugin"
NEEDS = {FOLDERS: "--config-dir needs a folder.", PLUGINS: "--plugin needs a package."}


class Parser(argparse.ArgumentParser):
    """Arguments of a command without a configuration, whole words alone; a mistake is told as everywhere else."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Refuse.

        Raises:
            UserError: always, with the message.
        """
        raise UserError(f"{self.prog}: {message}. See {self.prog} --help.")


@dataclass(frozen=True)
class Arguments:
    """Overrides as the user gave them, and the flags.

    Attributes:
        folders: of `--config-dir`.
        config_dirs: these, and the folder `conf` of each plugin that has one.
    """

    overrides: tuple[str, ...]
    folders: tuple[str, ...]
    config_dirs: tuple[str, ...]
    multirun: bool
    show_config: bool

    def compose(self, primary: str = "train") -> Tree:
        """The composed configuration.

        Args:
            primary: the file of conf/ that it begins with.

        Raises:
            UserError: it cannot be composed, or is one of several (`-m`), which are for `align train` to compose.
        """
        if self.multirun:
            raise UserError("-m, --multirun: only align train takes it; give one value for each key here.")
        return config.compose(primary, self.overrides, self.config_dirs)

    def print_config(self, primary: str = "train") -> None:
        """Print the composed configuration."""
        print_tree(self.compose(primary))


def print_tree(tree: Tree) -> None:
    """Print a configuration as YAML."""
    terminal.result(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip())


def explained(primary: str) -> str:
    """The file of conf/ whose keys a command takes, each with its comment."""
    return (paths.conf() / f"{primary}.yaml").read_text(encoding="utf-8").rstrip()


def parse(argv: Sequence[str]) -> Arguments:
    """Tell flags from overrides; the packages that `--plugin` names are known from here on.

    Raises:
        UserError: all arguments that are neither, or one that holds a secret.
    """
    refuse_secrets(argv)
    overrides: list[str] = []
    switches: set[str] = set()
    named: dict[str, list[str]] = {flag: [] for flag in NEEDS}
    problems: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if argument in SWITCHES:
            switches.add(SWITCHES[argument])
        elif flag in named:
            value = value or next(arguments, "")
            named[flag].append(value)
            if not value:
                problems.append(NEEDS[flag])
        elif argument.startswith("-"):
            near = config.did_you_mean(flag, [*SWITCHES, *named])
            problems.append(f"{argument}: no such option.{near} See align --help.")
        elif "=" not in argument and not argument.startswith("~"):
            problems.append(f"{argument}: write key=value, such as algo=nca or train.lr=1e-6.")
        else:
            overrides.append(_at_home(argument))
    if problems:
        raise UserError("\n".join(problems))
    config.use(named[PLUGINS])
    return Arguments(
        overrides=tuple(overrides),
        folders=tuple(named[FOLDERS]),
        config_dirs=(*named[FOLDERS], *folders_of(named[PLUGINS])),
        multirun="multirun" in switches,
        show_config="show_config" in switches,
    )


def _at_home(argument: str) -> str:
    """`key=~/x` with the home folder in place of ~, which a shell leaves as it is there and Hydra cannot read."""
    key, _, value = argument.partition("=")
    if not re.fullmatch(r"~(/[^,\[\]{}()'\"\s]*)?", value):
        return argument
    return f"{key}={config.quoted(os.path.expanduser(value))}"


def folders_of(packages: Sequence[str]) -> list[str]:
    """The folder `conf` of each package that brings one, so that its YAML need not be named apart."""
    folders: list[str] = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        folders += [str(Path(root, "conf")) for root in spec.submodule_search_locations or ()]
    return [folder for folder in folders if Path(folder).is_dir()]
