"""`align cache`: what is kept on disk, whether it is what it was, and the removal of what nobody uses."""

import argparse
import datetime
import io
import json
import random
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from align_cli import cache, exits, paths, terminal
from align_cli.cache import RECORD, Damaged, Sample
from align_cli.commands.arguments import Parser
from align_cli.commands.listing import print_table
from align_cli.errors import UserError

if TYPE_CHECKING:
    from align_cli.references import Frozen

DAY = 86400.0  # seconds
SMALL = {"weights": "digests of large files", "precision": "models tried"}
HEADINGS = ["what", "name", "from", "numerics", "holds", "size", "last used"]


def main(argv: list[str]) -> int:
    """Run `ls`, `verify` or `gc`; returns the exit code."""
    parser = Parser(prog="align cache", description=__doc__)
    commands = parser.add_subparsers(required=True)
    listing = commands.add_parser("ls", help="list what is kept", description=ls.__doc__)
    listing.set_defaults(command=ls)
    verifying = commands.add_parser("verify", help="check references", description=verify.__doc__)
    verifying.add_argument("folder", nargs="?", help="a folder, or the beginning of its name; without it all of them")
    verifying.add_argument("--sample", type=int, default=16, metavar="N", help="responses to measure again")
    verifying.set_defaults(command=verify)
    removing = commands.add_parser("gc", help="remove what is not used", description=gc.__doc__)
    removing.add_argument("--older-than", type=float, metavar="DAYS", help="also what was not used for so long")
    removing.add_argument("--dry-run", action="store_true", help="only say what would be done")
    removing.set_defaults(command=gc)
    given = parser.parse_args(argv)
    return given.command(given)


def references() -> list[Path]:
    """The folders of reference figures."""
    return _folders(paths.cache() / "references")


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("*") if path.is_dir())


def _files(kind: str, pattern: str) -> list[Path]:
    return sorted((paths.cache() / kind).glob(pattern))


def ls(given: argparse.Namespace) -> int:
    """List what is kept, each with its size and when it was last used.

    Reference figures, prepared data, embedded worlds, generated responses, ratings of baseline responses, a judge's
    answers, and the small notes on weights and on what this machine multiplies fastest.
    """
    rows = [_reference_row(folder) for folder in references()]
    rows += [_data_row(folder) for folder in _folders(paths.cache() / "data")]
    rows += [["world", folder.name, "", "", "", *_size_and_use(folder)] for folder in _folders(paths.cache() / "world")]
    rows += [_responses_row(folder) for folder in _folders(paths.cache() / "responses")]
    rows += [_baselines_row(file) for file in _files("baselines", "*.npz")]
    rows += [_judgments_row(file) for file in _files("judgments", "*.jsonl")]
    rows += [_small_row(kind, what) for kind, what in SMALL.items() if _files(kind, "*.json")]
    if not rows:
        terminal.say(f"{paths.cache()} is empty; runs and align score fill it")
        return exits.DONE
    print_table(HEADINGS, rows)
    terminal.say(f"{shown(size(paths.cache()))} in {paths.cache()}")
    return exits.DONE


def _reference_row(folder: Path) -> list[str]:
    origin = cache.read_origin(folder)
    responses = sum(path.stat().st_size // RECORD for path in folder.glob("*.figures"))
    digest, _, numerics = folder.name.partition("-")
    return [
        "reference",
        digest[:12],
        str(origin.get("model", "unknown")),
        numerics,
        f"{responses:,} responses",
        *_size_and_use(folder),
    ]


def _responses_row(folder: Path) -> list[str]:
    count = sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))
    return ["responses", folder.name[:12], "", "", f"{count:,} responses", *_size_and_use(folder)]


def _baselines_row(file: Path) -> list[str]:
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as there:
            holds = f"{len(there['names']):,} prompts"
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # damaged: a run draws them again
        holds = "unknown"
    return ["baselines", file.name[:12], "", "", holds, *_size_and_use(file)]


def _judgments_row(file: Path) -> list[str]:
    answers = file.read_bytes().count(b"\n")
    return ["judgments", file.name[:12], "", "", f"{answers:,} answers", *_size_and_use(file)]


def _small_row(kind: str, what: str) -> list[str]:
    files = _files(kind, "*.json")
    last = max(files, key=used)
    return [kind, "", "", "", f"{len(files):,} {what}", shown(sum(map(size, files))), _size_and_use(last)[1]]


def _data_row(folder: Path) -> list[str]:
    groups: list[str] = []
    for name, text in (("train", "to train on"), ("held_out", "held out")):
        try:
            report = json.loads((folder / name / "store.json").read_text(encoding="utf-8"))["report"]
            groups.append(f"{report[name]:,} {text}")
        except (OSError, ValueError, KeyError):  # half made, or of another version
            groups.append("unknown")
    return ["data", folder.name[:12], "", "", ", ".join(dict.fromkeys(groups)), *_size_and_use(folder)]


def _size_and_use(folder: Path) -> list[str]:
    return [shown(size(folder)), datetime.datetime.fromtimestamp(used(folder)).strftime("%Y-%m-%d %H:%M")]


def used(path: Path) -> float:
    """When a folder was last used, in seconds since 1970: its lock is touched by whoever reads figures."""
    lock = path / ".lock"
    return (lock if lock.exists() else path).stat().st_mtime


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def shown(count: int) -> str:
    """Bytes for people."""
    unit = next((u for u in ("B", "kB", "MB", "GB") if count < 1000 ** (1 + ("B", "kB", "MB", "GB").index(u))), "TB")
    return f"{count / 1000 ** ('B', 'kB', 'MB', 'GB', 'TB').index(unit):.3g} {unit}"


# --- verify


def verify(given: argparse.Namespace) -> int:
    """Check every shard against its digest and measure a random sample again; 1 if something is not what it was."""
    if given.sample < 0:
        raise UserError(f"--sample {given.sample}: use a number from 0 on.")
    wanted = references()
    if given.folder is not None:
        path = Path(given.folder)
        wanted = [path] if path.is_dir() else [folder for folder in wanted if folder.name.startswith(given.folder)]
        if not wanted:
            raise UserError(f"{given.folder}: no folder of references is named so; align cache ls lists them.")
    if not wanted:
        terminal.say(f"there are no references in {paths.cache()}")
    good = [_verified(folder, given.sample) for folder in wanted]
    return exits.DONE if all(good) else exits.FAILED


def _verified(folder: Path, sample: int) -> bool:
    """Whether a folder's shards are whole and its figures those of its model."""
    with cache.in_use(folder):
        shards, damaged = 0, 0
        for path in sorted(folder.glob("*.figures")):
            try:
                cache.read_shard(path)
                shards += 1
            except Damaged as error:
                damaged += 1
                path.rename(path.with_suffix(".damaged"))
                terminal.error(f"{error}; it is set aside, and its responses will be measured again")
        terminal.result(f"{folder.name}: {shards} shards are whole" + (f", {damaged} damaged" if damaged else ""))
        return _recomputed(folder, sample) and not damaged


def _recomputed(folder: Path, sample: int) -> bool:
    """Whether a sample of the figures is what the model gives now; True, and said, where that cannot be known."""
    kept = cache.Folder(folder, tidies=False)
    samples = [one for one in cache.read_samples(folder) if kept.find(cache.names_of([one[0]]))[1][0]]
    chosen = random.sample(samples, min(sample, len(samples)))
    if not chosen:
        terminal.result("  nothing measured again: no token ids are kept")
        return True
    import torch

    from align_cli.assembly import ROUNDING
    from align_cli.train import DRIFT, TOLERANCE

    origin = cache.read_origin(folder)
    try:
        reference, device = _loaded(origin)
    except UserError as reason:
        terminal.result(f"  nothing measured again: {reason}")
        return True
    dtype = torch.bfloat16 if origin["dtype"] == "bfloat16" else torch.float32
    apart: list[float] = []
    per_token: list[float] = []
    for one in chosen:
        before = float(kept.find(cache.names_of([one[0]]))[0][0])
        apart.append(abs(_measured(reference, one, device) - before))
        per_token.append(apart[-1] / len(one[2]))
    mean = sum(per_token) / len(per_token)
    good = max(per_token) <= ROUNDING[dtype] and mean <= (TOLERANCE if dtype == torch.float32 else DRIFT)
    terminal.result(
        f"  {len(chosen)} of {len(samples)} kept responses measured again: largest difference {max(apart):.3g} nats, "
        f"{max(per_token):.3g} a token; {'within' if good else 'BEYOND'} the rounding of {origin['dtype']}"
    )
    return good


def _loaded(origin: dict[str, str | int | None]) -> tuple["Frozen", str]:
    """The model that figures came from, with its kernels.

    Raises:
        UserError: it is not known, not there, has other weights by now, or needs a device that is absent.
    """
    import torch

    from align_cli.assembly import find_manner
    from align_cli.models.causal import Model, load_model
    from align_cli.references import Frozen, digest_of

    if not origin.keys() >= {"model", "revision", "weights", "dtype", "bits", "rows", "head", "device", "matmul"}:
        raise UserError("it is not known which model the figures came from")
    device = str(origin["device"])
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("the figures came from a GPU, and there is none")
    revision = None if origin["revision"] is None else str(origin["revision"])
    model = Model(
        name="hf",
        path=str(origin["model"]),
        revision=revision,
        rows=origin["rows"],  # pyright: ignore[reportArgumentType]
        head=origin["head"],  # pyright: ignore[reportArgumentType]
        architecture=None,
    )
    if digest_of(model) != origin["weights"]:
        raise UserError(f"{model.path} has other weights by now")
    torch.set_float32_matmul_precision(str(origin["matmul"]))
    dtype = torch.bfloat16 if origin["dtype"] == "bfloat16" else torch.float32
    network = load_model(model, dtype=dtype, bits=None if origin["bits"] is None else int(origin["bits"]))
    network = network.to(device).eval()  # pyright: ignore[reportArgumentType]
    where = torch.device(device)
    return Frozen(network, find_manner(network, network, model, dtype=dtype, logits_mb=256, device=where)), device


def _measured(reference: "Frozen", one: Sample, device: str) -> float:
    import numpy as np
    import torch

    from align_cli.data.batches import flatten
    from align_cli.data.store import Group

    name, prompt, response = one
    group = Group(index=0, prompt=prompt, responses=(response,), ratings=np.zeros(1, np.float32), where=name.hex())
    return float(reference(flatten([group]).to(torch.device(device))))


# --- gc


def gc(given: argparse.Namespace) -> int:
    """Remove what killed processes left and damaged shards, merge shards, and remove what was not used for long.

    A judge's answers are paid for, and stay. A run that is alive holds a lock on its references and one on the whole
    cache. References are changed only where their lock is free; everything else only where the lock of the whole cache
    is.
    """
    before = None if given.older_than is None else time.time() - given.older_than * DAY
    dry = given.dry_run
    freed = sum(_collected(folder, before, dry=dry) for folder in references())
    with cache.alone(paths.cache()) as free:
        if free:
            freed += sum(removed(path, dry=dry) for path in _unused(before))
        elif paths.cache().is_dir():
            terminal.say("a run is using the cache: data and worlds are left alone")
    terminal.result(f"{shown(freed)} {'would be' if dry else 'are'} freed in {paths.cache()}")
    return exits.DONE


def _collected(folder: Path, before: float | None, *, dry: bool) -> int:
    """Bytes freed in a folder of references, or by its removal."""
    old = before is not None and used(folder) < before
    with cache.alone(folder) as free:
        if not free:
            terminal.say(f"{folder.name} is in use: left alone")
            return 0
        if old:
            return removed(folder, dry=dry)
        for path in [] if dry else sorted(folder.glob("*.figures")):
            try:
                cache.read_shard(path)
            except Damaged:
                path.rename(path.with_suffix(".damaged"))
        leftovers = [*folder.glob("*.damaged"), *folder.glob(".*.tmp")]
        freed = sum(removed(path, dry=dry) for path in leftovers)
    before_merge = size(folder)
    merged = cache.tidy(folder, many=1, dry=dry)
    if merged:
        terminal.result(f"{'would merge' if dry else 'merged'} {merged} shards of {folder.name}")
    return freed + before_merge - size(folder)


def _unused(before: float | None) -> Iterator[Path]:
    """What killed processes left, and what was not used since `before`; references apart."""
    home = paths.cache()
    half = [*(home / "data").glob("*.tmp"), *(home / "world").glob("*.partial")]
    half += [path for kind in ("weights", "baselines") for path in (home / kind).glob(".*.tmp")]
    yield from half
    if before is None:
        return
    folders = [folder for kind in ("data", "world", "responses") for folder in _folders(home / kind)]
    kept = [*folders, *_files("weights", "*.json"), *_files("baselines", "*.npz")]
    yield from (path for path in kept if path not in half and path.stat().st_mtime < before)


def removed(path: Path, *, dry: bool) -> int:
    """Remove a file or folder, or only say so; returns its bytes."""
    freed = size(path)
    terminal.result(f"{'would remove' if dry else 'removed'} {path} ({shown(freed)})")
    if dry:
        return freed
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    return freed
