"""A run directory: who is using it, and the small files in it. Metrics and checkpoints have their own modules.

Whatever is written here is either the old file or the new one, never half of it.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import align_cli
from align_cli import secrets, terminal
from align_cli.errors import UserError
from align_cli.files import fsync_folder, locked

try:  # libyaml's, ten times as fast, which counts where a sweep has a thousand runs
    from yaml import CSafeLoader as SafeLoader
except ImportError:
    from yaml import SafeLoader

LOCK = ".lock"
CONFIG = "config.yaml"
ENV = "env.json"
SUMMARY = "summary.json"
SAMPLES, SAMPLES_BEFORE = "samples.json", "samples_before.json"

Scalar = str | int | float | bool | None


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, and a restart after a crash, sees all of it or what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


# --- who is using it


def holder(run_dir: Path) -> str | None:
    """Who is using a run directory, as 'process 12 on host', or None."""
    path = run_dir / LOCK
    if not path.exists():
        return None
    with open(path, encoding="utf-8") as file:
        try:
            locked(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip() or "a process that is just starting"
    return None


@contextlib.contextmanager
def lock(run_dir: Path, key: str = "run.dir") -> Iterator[int]:
    """Use a directory alone; `key` is what named it.

    The kernel releases the lock when its process ends, however it ends, so that a killed run leaves no stale lock.
    Processes that inherit the descriptor that this yields hold the lock, too.

    Raises:
        UserError: another process is using it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / LOCK).touch()
    except OSError as error:
        raise UserError(f"{key}={run_dir} cannot be written: {error.strerror}; choose another {key}") from error
    with open(run_dir / LOCK, "a+", encoding="utf-8") as file:
        try:
            if not locked(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
                terminal.warn(f"{key}={run_dir} lies on a file system without locks; start no second run there")
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "a process that is just starting"
            raise UserError(
                f"{key}={run_dir} is in use by {owner}; wait for it to end, or choose another {key}"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield file.fileno()
        file.truncate(0)


def forget(run_dir: Path, *, made: bool) -> None:
    """Remove what a new run has left that ended with a mistake before its first step; the caller holds the lock.

    Args:
        made: the folder is the run's own, too.
    """
    checkpoints = run_dir / "checkpoints"
    if (run_dir / "metrics.jsonl").exists() or (checkpoints.exists() and any(checkpoints.iterdir())):
        return
    if checkpoints.exists():
        checkpoints.rmdir()
    shutil.rmtree(run_dir / "ranks", ignore_errors=True)
    for name in (CONFIG, ENV, SAMPLES_BEFORE, LOCK):
        (run_dir / name).unlink(missing_ok=True)
    if made and not any(run_dir.iterdir()):
        run_dir.rmdir()


def is_empty(run_dir: Path) -> bool:
    """Whether a new run may start in a folder: it is absent, or holds nothing but a lock."""
    if run_dir.is_file():
        raise UserError(f"run.dir={run_dir} is a file; a run needs a folder of its own")
    return not run_dir.exists() or all(path.name == LOCK for path in run_dir.iterdir())


# --- config.yaml


def _refuse_code(node: object, where: str, file: Path) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not isinstance(key, str):
                raise UserError(f"{file}: the key {key!r} under '{where or '.'}' is not text; keys are names")
            path = f"{where}.{key}" if where else key
            if key.startswith("_") and key.endswith("_") and len(key) > 2:
                raise UserError(f"{file}: '{path}' would choose code to run; a run's configuration holds values only")
            if path == "hydra":
                raise UserError(f"{file}: a 'hydra' node configures the launcher; a run's configuration holds none")
            _refuse_code(value, path, file)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _refuse_code(value, f"{where}[{index}]", file)
    elif isinstance(node, str) and "${" in node:
        raise UserError(f"{file}: '{where}' holds the interpolation {node!r}; a run's configuration is resolved")


def write_config(run_dir: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved configuration.

    Raises:
        UserError: it holds what `read_config` would refuse.
    """
    path = run_dir / CONFIG
    _refuse_code(config, "", path)
    write_atomic(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def read_config(run_dir: Path) -> dict[str, Any]:
    """The configuration of a run.

    A run directory may come from anyone, so what would choose code, configure the launcher or read the environment
    is refused.

    Raises:
        UserError: there is none, it is not YAML, or it holds a key such as `_target_`, a `hydra` node or `${...}`.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no {CONFIG}")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds {type(config).__name__}, not a mapping of keys to values")
    _refuse_code(config, "", path)
    return config


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as one level with dots: {'algo': {'beta': 1}} becomes {'algo.beta': 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """What differs between two configurations, a line for each key: 'algo.beta: 0.1 -> 0.2'.

    A key of `ignore`, and whatever is below it, may differ.
    """
    before, after = flatten(old), flatten(new)

    def shown(flat: dict[str, Any], key: str) -> str:
        return repr(flat[key]) if key in flat else "absent"

    return [
        f"{key}: {shown(before, key)} -> {shown(after, key)}"
        for key in dict.fromkeys([*before, *after])
        if shown(before, key) != shown(after, key)
        and not any(key == name or key.startswith(f"{name}.") for name in ignore)
    ]


# --- env.json

_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "hydra-core",
    "numpy",
    "omegaconf",
    "peft",
    "pydantic",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "wandb",
)


def versions() -> dict[str, str | None]:
    """The version of each package that decides what a run computes; None where it is not installed."""
    found: dict[str, str | None] = {"align": align_cli.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_revision() -> str | None:
    """The commit of the checkout that align runs from, with '+changes' where files differ; None for a wheel."""
    root = Path(align_cli.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout of another user
        return None
    return f"{commit}+changes" if status else commit


def write_env(
    run_dir: Path, *, device: str, ranks: int, data: Mapping[str, int | str], command: Sequence[str] = ()
) -> None:
    """Write what a run runs on. A resume keeps what was there before under `before`, the oldest first.

    Args:
        data: what became of the rows, by name.
        command: the arguments as they were given; secrets in them are struck out.
    """
    path = run_dir / ENV
    earlier: list[Any] = []
    if path.exists():
        last = json.loads(path.read_text(encoding="utf-8"))
        earlier = [*last.pop("before"), last]
    environment = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": secrets.redact(list(command) or sys.argv),
        "device": device,
        "ranks": ranks,
        "data": dict(data),
        "platform": platform.platform(),
        "git": git_revision(),
        "versions": versions(),
        "before": earlier,
    }
    write_atomic(path, json.dumps(environment, indent=2) + "\n")


# --- summary.json


def plain(value: Scalar) -> Scalar:
    """A value as strict JSON can hold it: JSON has no NaN and no infinity, they become 'nan', 'inf' and '-inf'."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_summary(run_dir: Path, summary: Mapping[str, Scalar]) -> None:
    """Write the final figures, flat: a name and a value each.

    Raises:
        TypeError: a value is not a number, a text, a truth value or None.
    """
    for name, value in summary.items():
        if value is not None and not isinstance(value, str | int | float):
            raise TypeError(f"summary figure {name!r} is a {type(value).__name__}; figures are plain values")
    write_atomic(
        run_dir / SUMMARY, json.dumps({name: plain(value) for name, value in summary.items()}, indent=2) + "\n"
    )


def read_summary(run_dir: Path) -> dict[str, Scalar] | None:
    """The final figures of a run; None where it has not finished."""
    path = run_dir / SUMMARY
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); removed, it is made again by align train") from error
