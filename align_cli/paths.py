"""Where things are: the configuration and the recipes that ship with the package, and the cache."""

import os
from pathlib import Path

import platformdirs

_PACKAGE = Path(__file__).resolve().parent


def _shipped(folder: str) -> Path:
    """A wheel carries the folder inside the package; a checkout (editable install, sdist) has it beside the package."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


def conf() -> Path:
    """The folder of configuration groups: `conf()/algo/nca.yaml`."""
    return _shipped("conf")


def recipes() -> Path:
    """The folder of recipes, one folder per paper: `recipes()/nca/figure5.yaml`."""
    return _shipped("recipes")


def cache() -> Path:
    """The folder for what can be made again: the embedded world, tokenised data, reference log-probabilities.

    `ALIGN_CACHE` names it; without it, it is the platform's cache folder.
    """
    named = os.environ.get("ALIGN_CACHE")
    return Path(named).expanduser().absolute() if named else platformdirs.user_cache_path("align")
