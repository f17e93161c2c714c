"""The arguments that train, plan and data show share: Hydra overrides and a few flags."""

from collections.abc import Sequence
from dataclasses import dataclass

from align_cli import config
from align_cli.config import Tree
from align_cli.errors import UserError
from align_cli.secrets import refuse_secrets


@dataclass(frozen=True)
class Arguments:
    """Overrides as the user gave them, and the flags."""

    overrides: tuple[str, ...]
    config_dirs: tuple[str, ...]
    multirun: bool
    show_config: bool

    def compose(self) -> Tree:
        """The composed training configuration."""
        return config.compose("train", self.overrides, self.config_dirs)


def parse(argv: Sequence[str]) -> Arguments:
    """Tell flags from overrides.

    Raises:
        UserError: an argument is neither, or holds a secret.
    """
    refuse_secrets(argv)
    overrides: list[str] = []
    config_dirs: list[str] = []
    multirun = show_config = False
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("-m", "--multirun"):
            multirun = True
        elif argument in ("--cfg", "--config"):
            show_config = True
        elif argument == "--config-dir" or argument.startswith("--config-dir="):
            folder = argument.partition("=")[2] or next(arguments, "")
            if not folder:
                raise UserError("--config-dir needs a folder.")
            config_dirs.append(folder)
        elif argument.startswith("-"):
            flags = ["-m", "--multirun", "--config-dir", "--cfg"]
            raise UserError(f"{argument}: no such option.{config.did_you_mean(argument, flags)} See align --help.")
        elif "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument}: key=value would be right, such as algo=nca or train.lr=1e-6.")
        else:
            overrides.append(argument)
    return Arguments(tuple(overrides), tuple(config_dirs), multirun, show_config)
