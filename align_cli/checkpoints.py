"""Checkpoints that are whole or absent.

All ranks write into `step_00000100.tmp`. When every rank has finished, the files are synchronised to the disk and
their sizes and hashes gathered; rank 0 writes them into `manifest.json`, renames the folder to `step_00000100`, which
is the commit, and replaces `latest.json`. Only then are older checkpoints removed. What has no valid manifest is never
loaded, so a process may be killed at any moment.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_cli import distributed, terminal
from align_cli.errors import RunError
from align_cli.files import fsync_folder
from align_cli.rundir import write_atomic

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest.json"
_FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(RunError):
    """A checkpoint could not be saved, or none of those there are is whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: a folder whose manifest names its files."""

    folder: Path
    step: int
    ranks: int
    files: tuple[tuple[str, int, str], ...]  # name, bytes, sha256

    def state(self) -> dict[str, Any]:
        """What was given to `saving` beside the files."""
        return json.loads((self.folder / STATE).read_text(encoding="utf-8"))


def committed(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a folder whose files are all there with the right sizes, the newest first."""
    if not folder.is_dir():
        return []
    found = (_read(path) for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted((checkpoint for checkpoint in found if checkpoint), key=lambda it: it.step, reverse=True)


class Checkpoints:
    """The checkpoints of one run. Every method is called by all ranks together.

    Args:
        folder: `RUN/checkpoints`, on a file system that all ranks see.
        keep: how many to keep, at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint is kept")
        self.folder = folder
        self.keep = keep
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _clear_leftovers(folder)
            for checkpoint in committed(folder)[:1]:
                _point_to(checkpoint.folder, checkpoint.step)  # a kill may have come between the commit and this
        distributed.gather(None)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files have the hashes of its manifest; None where none was ever committed.

        Raises:
            CheckpointError: there are checkpoints and none is whole.
        """
        # A folder that rank 0 has just made may not be there yet for another node.
        mine = (_steps(self.folder), committed(self.folder)) if distributed.rank() == 0 else ([], [])
        there, candidates = distributed.gather(mine)[0]
        damaged = dict.fromkeys(there, "a file is missing or has another size")
        for checkpoint in candidates:
            wrong = _damage(checkpoint)
            if not wrong:
                break
            damaged[checkpoint.step] = f"wrong hash: {', '.join(wrong)}"
        else:
            if there:
                told = "; ".join(f"{_name(step)}: {reason}" for step, reason in sorted(damaged.items()))
                raise CheckpointError(
                    f"no checkpoint in {self.folder} is whole ({told}); "
                    "put one back, or remove the folder to start again from step 0"
                )
            return None
        for step, reason in damaged.items():
            if step > checkpoint.step and distributed.rank() == 0:
                terminal.warn(f"{self.folder / _name(step)} is damaged ({reason}); step {checkpoint.step} is used")
        return checkpoint

    @contextlib.contextmanager
    def saving(self, step: int, state: Mapping[str, Any]) -> Iterator[Path]:
        """Save a checkpoint: all ranks write files into the folder that this yields; leaving the block commits it.

        Args:
            step: optimizer steps done.
            state: plain values that rank 0 writes beside the files, as JSON.

        Raises:
            CheckpointError: a rank could not write. What was committed before is untouched.
        """
        final = self.folder / _name(step)
        folder = final.with_name(final.name + ".tmp")
        with self._together(step, folder):
            if distributed.rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
        with self._together(step, folder):
            yield folder
            if distributed.rank() == 0:
                (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        # What another node has just written may be missing in a network file system's listing, so all ranks look.
        names = sorted({name for seen in distributed.gather(_files(folder)) for name in seen})
        mine: list[tuple[str, int, str]] = []
        with self._together(step, folder):
            mine = [_seal(folder, name) for name in _share(names)]
        files = [entry for entries in distributed.gather(mine) for entry in entries]
        with self._together(step, folder):
            if distributed.rank() == 0:
                self._commit(step, folder, final, sorted(files))
        if distributed.rank() == 0:
            try:
                _point_to(final, step)
                self._remove_older(step)
            except OSError as error:  # the checkpoint is committed: what is left undone is done at the next start
                terminal.warn(f"{final} is saved, and tidying up beside it failed: {error}")

    @contextlib.contextmanager
    def _together(self, step: int, folder: Path) -> Iterator[None]:
        """A part of saving that all ranks leave with success, or all with an error."""
        failure: Exception | None = None
        try:
            yield
        # whatever went wrong (a full disk shows as OSError, as torch's RuntimeError, as safetensors' own error), the
        # other ranks wait for this one and have to be told
        except Exception as error:
            failure = error
        failures = distributed.gather(f"{type(failure).__name__}: {failure}" if failure else None)
        if not any(failures):
            return
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text)
        before = committed(self.folder)
        kept = f"the checkpoint of step {before[0].step} is untouched" if before else "there was none before"
        raise CheckpointError(
            f"the checkpoint of step {step} could not be saved to {self.folder} ({told}); {kept}"
        ) from (failure)

    def _commit(self, step: int, folder: Path, final: Path, files: list[tuple[str, int, str]]) -> None:
        manifest = {
            "format": _FORMAT,
            "step": step,
            "ranks": distributed.world(),
            "files": [{"name": name, "bytes": size, "sha256": digest} for name, size, digest in files],
        }
        write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            fsync_folder(path)
        replaced = final.with_name(final.name + ".replaced")
        if final.exists():
            final.rename(replaced)
        folder.rename(final)
        fsync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _remove_older(self, step: int) -> None:
        """Keep the newest ones up to `step`. Later ones are damaged: a run starts from the newest that is whole."""
        steps = _steps(self.folder)
        kept = [number for number in steps if number <= step][-self.keep :]
        for number in set(steps) - set(kept):
            doomed = self.folder / f"{_name(number)}.tmp"
            (self.folder / _name(number)).rename(doomed)
            shutil.rmtree(doomed)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _steps(folder: Path) -> list[int]:
    return sorted(int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name)))


def _point_to(folder: Path, step: int) -> None:
    write_atomic(folder.parent / LATEST, json.dumps({"step": step, "folder": folder.name}) + "\n")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _share(names: Sequence[Any]) -> Sequence[Any]:
    """This rank's part of the files. Who wrote a file does not matter: to synchronise and hash it is to read it."""
    return names[distributed.rank() :: distributed.world()]


def _seal(folder: Path, name: str) -> tuple[str, int, str]:
    with open(folder / name, "rb+") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return name, file.tell(), digest


def _read(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder, None where its manifest or a file's size is not right."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or _name(manifest["step"]) != folder.name:
            return None
        files = tuple((entry["name"], entry["bytes"], entry["sha256"]) for entry in manifest["files"])
        if any((folder / name).stat().st_size != size for name, size, _ in files):
            return None
        return Checkpoint(folder, manifest["step"], manifest["ranks"], files)
    # absent, cut short, or no manifest of ours: all of them mean that this is no checkpoint
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _damage(checkpoint: Checkpoint) -> list[str]:
    """The files that do not have the hash of the manifest. All ranks call it, and each reads a part."""
    wrong: list[str] = []
    for name, _, digest in _share(checkpoint.files):
        with open(checkpoint.folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                wrong.append(name)
    return sorted(name for names in distributed.gather(wrong) for name in names)


def _clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written, and put back what it was about to replace."""
    for path in folder.iterdir():
        if path.suffix == ".replaced" and not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
        elif path.suffix in (".tmp", ".replaced"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
