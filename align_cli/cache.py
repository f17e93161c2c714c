"""Figures on disk, found by name: append-only shards that are whole or absent, shared by runs that live at once.

A folder belongs to the weights and numerics that its figures were measured with. In it lie

    <digest>.figures    a shard: n names of 16 bytes in ascending order, then n float32; `digest` is of these bytes
    <digest>.covers     which shards hold every response of a prepared dataset, so that it need not be looked through
    origin.json         the model that the weights were read from, and the numerics
    sample.npz          the token ids of some responses, to measure them again
    .lock               held shared by every process that reads figures; whoever removes a file holds it alone
    *.damaged           a shard whose bytes have another digest than its name; it is set aside and never read

A shard is never changed. Where two shards have a figure of one name, the older shard's holds, for every run and after
every merge, so that a run that is resumed finds the figures that it began with.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import mmap
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from align_cli import terminal
from align_cli.files import fsync_folder

NAME = 16  # bytes of a name
RECORD = NAME + 4  # bytes of a figure with its name
MANY = 16  # shards that a run finds unmerged before it merges them
SAMPLED = 256  # responses whose token ids are kept
SETTLED = 2.0  # seconds a file has to lie unchanged before its digest is kept; clocks of file systems are coarse
TRIES = 100  # to lock a folder that is being removed
LARGE = 1 << 24  # bytes of a file whose digest is worth keeping
MAPPED = 1 << 20  # bytes from which a shard is mapped and not read: a mapping costs one of a process's few open files
MISSING, FOUND, OWN = 0, 1, 2  # whether a figure is there, and whether this process has added it

Names = NDArray[np.bytes_]
Figures = NDArray[np.float32]
Sample = tuple[bytes, NDArray[np.int32], NDArray[np.int32]]
"""A name with the prompt and the response that it stands for."""


class Damaged(ValueError):
    """A shard's bytes are not those that it was written with."""


@dataclass(frozen=True)
class Shard:
    """Figures of one file, or of none.

    Attributes:
        names: (n,) of 16 bytes, ascending.
        values: (n,).
        mapped: the bytes of a large file; None for figures that are held in memory.
    """

    names: Names
    values: Figures
    mapped: mmap.mmap | None

    def find(self, wanted: Names) -> tuple[Figures, NDArray[np.bool_]]:
        """The figure of each wanted name, and whether there is one."""
        place = np.minimum(np.searchsorted(self.names, wanted), len(self.names) - 1)
        return self.values[place], self.names[place] == wanted

    def let_go(self) -> None:
        """Tell the kernel that the pages need not stay in this process's memory; a later look maps them again."""
        if self.mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED)


def names_of(names: Sequence[bytes]) -> Names:
    """Names as an array; zero bytes at their ends count."""
    return np.frombuffer(b"".join(names), dtype=f"S{NAME}")


def merged(shards: Sequence[Shard]) -> Shard:
    """All figures of shards; the first shard's where several have one name."""
    names, first = np.unique(np.concatenate([shard.names for shard in shards]), return_index=True)
    return Shard(names, np.concatenate([shard.values for shard in shards])[first], None)


def content(shard: Shard) -> bytes:
    """The bytes of a shard's file."""
    return shard.names.tobytes() + shard.values.astype("<f4", copy=False).tobytes()


def digest(data: bytes | mmap.mmap) -> str:
    """What names a shard's file."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_shard(path: Path) -> Shard:
    """Map a shard, or read a small one, and check it.

    Raises:
        Damaged: its bytes do not have the digest that names it.
        OSError: it cannot be read, or is gone.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0 or size % RECORD:
            raise Damaged(f"{path}: {size} bytes are not whole figures")
        mapped = None if size < MAPPED else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = file.read() if mapped is None else mapped
    if digest(data) != path.stem:
        raise Damaged(f"{path}: its content is not what was written")
    count = size // RECORD
    shard = Shard(
        np.frombuffer(data, dtype=f"S{NAME}", count=count),
        np.frombuffer(data, dtype="<f4", offset=NAME * count),
        mapped,
    )
    shard.let_go()
    return shard


def write(path: Path, data: bytes) -> None:
    """Write a file, whole and durable or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")  # processes of two machines may have one number
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what is left of it is removed by gc
            temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


# --- who is using a folder


def hold(folder: Path) -> int | None:
    """Say that this process reads a folder, until the descriptor is closed; the kernel closes it in every case.

    Returns:
        A descriptor; None where no lock can be had, which is so where nothing can be removed either.
    """
    for _ in range(TRIES):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        descriptor = _opened(folder / ".lock")
        if descriptor is None:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with contextlib.suppress(OSError):
                os.utime(descriptor)  # when the folder was last used
            if os.fstat(descriptor).st_ino == (folder / ".lock").stat().st_ino:
                return descriptor
        except FileNotFoundError:  # the folder was removed while this process waited for its lock
            pass
        except OSError:  # a file system without locks
            os.close(descriptor)
            return None
        os.close(descriptor)
    return None


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Within the block this process reads the folder."""
    descriptor = hold(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Whether no process reads the folder; if so, none begins to within the block."""
    descriptor = _opened(folder / ".lock")
    if descriptor is None:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # somebody holds it, or there are no locks
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _opened(lock: Path) -> int | None:
    for flags in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):
        with contextlib.suppress(OSError):
            return os.open(lock, flags, 0o666)
    return None


def touch(path: Path) -> None:
    """Note that a folder or file is used now."""
    with contextlib.suppress(OSError):  # a cache that cannot be written; then nothing is removed from it either
        os.utime(path)


# --- the figures of a folder


class Folder:
    """All figures of a folder, and those that are added.

    Args:
        folder: made where it is absent.
        tidies: whether this process merges shards and says what is damaged; one of those that share a machine.
    """

    def __init__(self, folder: Path, *, tidies: bool) -> None:
        self.folder = folder
        self.writable = True
        self.shards: dict[str, Shard] = {}
        self.added: set[str] = set()
        self.memory: Shard | None = None
        self.refused: set[str] = set()
        if tidies:
            with self.attempt():
                folder.mkdir(parents=True, exist_ok=True)
            if folder.is_dir():
                tidy(folder, many=MANY)
        descriptor = hold(folder)
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)
        self.refresh()

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Write within the block, while `writable`; the first failure is said and the last."""
        try:
            yield
        except OSError as error:
            self.writable = False
            terminal.warn(
                f"{self.folder} cannot be written: {error.strerror}; the run keeps the reference's figures in memory, "
                "and later runs measure them again"
            )

    def refresh(self) -> None:
        """Open the shards that have come, oldest first; damaged ones are set aside."""
        ages: dict[str, tuple[int, str]] = {}
        for path in self.folder.glob("*.figures"):
            if path.name in self.refused:
                continue
            try:
                if path.name not in self.shards:
                    self.shards[path.name] = read_shard(path)
                ages[path.name] = (path.stat().st_mtime_ns, path.name)
            except FileNotFoundError:  # merged by somebody who saw no lock of ours; its figures have come as well
                self.shards.pop(path.name, None)
                return self.refresh()
            except (Damaged, OSError) as error:
                self._set_aside(path, error)
        self.shards = {name: self.shards[name] for name in sorted(ages, key=lambda name: ages[name])}

    def _set_aside(self, path: Path, error: Exception) -> None:
        self.refused.add(path.name)
        with contextlib.suppress(OSError):  # a folder that cannot be written
            if isinstance(error, Damaged):
                path.rename(path.with_suffix(".damaged"))
        told = "is damaged" if isinstance(error, Damaged) else f"cannot be read ({error})"
        terminal.warn(f"{path} {told}; its responses are measured again")

    def find(self, names: Names) -> tuple[Figures, NDArray[np.int8]]:
        """The figure of each name, and whether it is there: MISSING, FOUND or OWN."""
        values = np.zeros(len(names), dtype=np.float32)
        state = np.zeros(len(names), dtype=np.int8)
        left = np.argsort(names)  # a search for ascending names is several times faster
        memory = {} if self.memory is None else {"": self.memory}
        for file, shard in (self.shards | memory).items():
            if not left.size:
                break
            found, there = shard.find(names[left])
            values[left[there]] = found[there]
            state[left[there]] = OWN if file in self.added else FOUND
            left = left[~there]
        return values, state

    def add(self, names: Names, values: Figures) -> str:
        """Commit figures as a shard; where that fails, or another process does it, `adopt` keeps them.

        Returns:
            The name of the shard's file.
        """
        data = content(merged([Shard(names, values, None)]))
        file = f"{digest(data)}.figures"
        if self.writable:
            with self.attempt():
                write(self.folder / file, data)
        return file

    def adopt(self, names: Names, values: Figures, *, own: bool) -> None:
        """Have figures that are in a shard by now, or keep them in memory."""
        shard = merged([Shard(names, values, None)])
        file = f"{digest(content(shard))}.figures"
        self.refresh()
        if file not in self.shards:
            file = ""
            self.memory = shard if self.memory is None else merged([self.memory, shard])
        if own:
            self.added.add(file)

    def let_go(self) -> None:
        """Keep no page of the shards in memory until it is looked at again."""
        for shard in self.shards.values():
            shard.let_go()

    # --- what need not be looked through

    def covers(self, dataset: str) -> bool:
        """Whether every response of a dataset is known to be in shards that are here."""
        told = _read_json(self.folder / f"{_short(dataset)}.covers")
        return isinstance(told, list) and bool(told) and set(told) <= self.shards.keys()

    def cover(self, dataset: str) -> None:
        """Note that the shards that are here hold every response of a dataset."""
        if self.writable and self.memory is None and self.shards:
            with self.attempt():
                write(self.folder / f"{_short(dataset)}.covers", json.dumps(sorted(self.shards)).encode())

    # --- where the figures are from

    def describe(self, origin: Mapping[str, str | int | None]) -> None:
        """Note what the figures are measured with; the last run knows best where its model lies."""
        if self.writable and read_origin(self.folder) != dict(origin):
            with self.attempt():
                write(self.folder / "origin.json", json.dumps(dict(origin), indent=1).encode())

    def keep_samples(self, candidates: Sequence[Sample]) -> None:
        """Keep the responses with the smallest names: names are digests, so these are drawn at random."""
        if not self.writable:
            return
        before = read_samples(self.folder)
        bound = before[-1][0] if len(before) >= SAMPLED else None
        fresh = {sample[0]: sample for sample in candidates if bound is None or sample[0] < bound}
        if not fresh.keys() - {sample[0] for sample in before}:
            return
        chosen = [sample for _, sample in sorted((fresh | {s[0]: s for s in before}).items())][:SAMPLED]
        data = io.BytesIO()
        np.savez(
            data,
            names=np.frombuffer(b"".join(name for name, _, _ in chosen), dtype=np.uint8),
            lengths=np.array([(len(prompt), len(response)) for _, prompt, response in chosen], dtype=np.int64),
            tokens=np.concatenate([ids for _, *pair in chosen for ids in pair]).astype(np.int32),
        )
        with self.attempt():
            write(self.folder / "sample.npz", data.getvalue())


def read_samples(folder: Path) -> list[Sample]:
    """The responses that are kept to be measured again, by name; none where they cannot be read."""
    try:
        with open(folder / "sample.npz", "rb") as file, np.load(file, allow_pickle=False) as stored:
            names, lengths, tokens = stored["names"].tobytes(), stored["lengths"], stored["tokens"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # absent, or cut: it is a help and no more
        return []
    ends = np.cumsum(lengths.reshape(-1))
    pieces = np.split(tokens.astype(np.int32), ends[:-1])
    return [
        (names[NAME * place : NAME * (place + 1)], pieces[2 * place], pieces[2 * place + 1])
        for place in range(len(lengths))
    ]


def read_origin(folder: Path) -> dict[str, str | int | None]:
    """What a folder's figures were measured with; {} where it is not known."""
    told = _read_json(folder / "origin.json")
    return told if isinstance(told, dict) else {}


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut by a full disk
        return None


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def tidy(folder: Path, *, many: int, dry: bool = False) -> int:
    """Remove what a killed process left, and merge shards where there are more than `many`.

    Nothing is done while a process holds the folder. The merged shard is committed before those that it holds are
    removed, so a kill in between leaves figures twice and never none.

    Args:
        dry: nothing is changed.

    Returns:
        How many shards were merged into one.
    """
    with alone(folder) as free:
        shards = list(folder.glob("*.figures"))
        if not free:
            return 0
        try:
            for path in () if dry else folder.glob(".*.tmp"):
                path.unlink()
            return _merge(folder, shards, dry=dry) if len(shards) > many else 0
        except (OSError, Damaged):  # a full or read-only disk, or a shard that whoever opens it sets aside
            return 0


def _merge(folder: Path, paths: Sequence[Path], *, dry: bool) -> int:
    ordered = sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))
    if dry:
        return len(ordered)
    data = content(merged([read_shard(path) for path in ordered]))
    whole = folder / f"{digest(data)}.figures"
    write(whole, data)
    covered = {path.name for path in ordered}
    for note in folder.glob("*.covers"):
        told = _read_json(note)
        if isinstance(told, list) and set(told) <= covered:
            write(note, json.dumps([whole.name]).encode())
        else:
            note.unlink()
    for path in ordered:
        if path != whole:
            path.unlink()
    return len(ordered)


# --- digests of large files


def file_digest(path: Path, kept: Path) -> str:
    """A digest of a file's bytes; a large file's is kept, and found while the file is the same.

    Path, device, inode, size and both times must agree. The time of the last change of the inode cannot be set back
    by a program that writes into a file, and a file that has changed just now is not kept at all.

    Args:
        kept: the folder of digests.
    """
    stat = path.stat()
    key = [str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    note = kept / f"{_short(json.dumps(key))}.json"
    told = _read_json(note) if stat.st_size >= LARGE else None
    if isinstance(told, dict) and told.get("key") == key and isinstance(told.get("digest"), str):
        return told["digest"]
    hashed = hashlib.blake2b(digest_size=16)
    begun = time.time()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            hashed.update(block)
    after = path.stat()
    still = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if still and stat.st_size >= LARGE and begun - stat.st_ctime >= SETTLED:
        with contextlib.suppress(OSError):  # a full or read-only disk; the digest is computed again next time
            kept.mkdir(parents=True, exist_ok=True)
            write(note, json.dumps({"key": key, "digest": hashed.hexdigest()}).encode())
    return hashed.hexdigest()
