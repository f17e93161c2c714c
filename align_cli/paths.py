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
    """The folder for what can be made again, though a judge's answers only at their price.

    It has a folder of each kind: `world`, `data` (tokenised), `references` (log-probabilities), `responses` (that
    evaluations generated), `baselines` (ratings of the starting model's responses), `judgments` (of judges), `weights`
    (digests of large files) and `precision` (what this machine multiplies fastest). `ALIGN_CACHE` names it; without
    it, it is the platform's cache folder.
    """
    named = os.environ.get("ALIGN_CACHE")
    return Path(named).expanduser().absolute() if named else platformdirs.user_cache_path("align")


def whole(path: str) -> str:
    """A file or folder of this machine by its whole path; anything else, such as a hub id, as it is."""
    place = Path(path).expanduser()
    return str(place.absolute()) if path and place.exists() else path
