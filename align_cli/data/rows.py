"""Rows of a dataset, one after another, each with a label that a person can find it by.

A local path is a file (.jsonl, .json, .parquet, .arrow, the first two also with .gz), a folder of such files, or a
folder that `datasets` saved. Anything else is an id on the Hugging Face hub. JSONL, Parquet and Arrow files are read
piece by piece: memory does not grow with the file. No code of a dataset is ever run.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import cast

from align_cli.data.records import Row, RowError
from align_cli.errors import UserError, first_line

Labelled = tuple[str, Row | RowError]

BATCH = 256  # rows of a Parquet file held at a time
BUFFER = 1 << 20  # bytes of a column of a Parquet file held at a time
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # how the hub names the files of a split
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one split.

    Attributes:
        name: for messages.
        identity: changes when the rows do.
        rows: iterates over (label, row), a RowError in the place of a row that cannot be read.
    """

    name: str
    identity: str
    rows: Callable[[], Iterator[Labelled]]


def open_rows(path: str, *, revision: str | None, subset: str | None, split: str) -> Rows:
    """The rows of `split` under a local path or a hub id.

    Raises:
        UserError: there is nothing of that name, no such split, or a file of an unknown kind.
    """
    local = Path(path).expanduser()
    if local.is_dir() and not saved_by_datasets(local):
        folder = local / subset if subset else local
        if not folder.is_dir():
            raise UserError(f"data.path={path} has no folder '{subset}': set data.subset to one it has, or to null.")
        return from_files(files_of(folder, split), name=path)
    if local.is_dir():
        return from_saved(local, split)
    if local.is_file():
        return from_files([local], name=path)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is None or looks_like_file(path) or path.startswith("."):
        raise UserError(f"data.path={path}: there is no such file or folder (seen from {Path.cwd()}).")
    return from_hub(path, revision=revision, subset=subset, split=split)


def has_splits(path: str) -> bool:
    """Whether a path may hold several splits: a single file is one."""
    return not Path(path).expanduser().is_file()


def looks_like_file(path: str) -> bool:
    return kind_of(Path(path)) in READERS


# Local files


def from_files(files: list[Path], name: str) -> Rows:
    for file in files:
        if kind_of(file) not in READERS:
            raise UserError(
                f"data.path={file}: unknown kind of file. Known: {', '.join(READERS)}, the first two also .gz."
            )

    def rows() -> Iterator[Labelled]:
        for file in files:
            yield from READERS[kind_of(file)](file)

    return Rows(name, digest_of(files), rows)


def kind_of(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else "".join(suffixes[-1:])


def digest_of(files: Iterable[Path]) -> str:
    """A digest of what the files hold."""
    digest = hashlib.blake2b()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, hashlib.blake2b).digest())
    return digest.hexdigest()


def files_of(folder: Path, split: str) -> list[Path]:
    """The data files of a split in a folder: those with its name in theirs, or all where no file names a split.

    Where files are named as the hub names its shards, `train_prefs-00000-of-00002`, they are those of the whole name.

    Raises:
        UserError: there are none.
    """
    found = sorted(file for file in folder.rglob("*") if file.is_file() and kind_of(file) in READERS)
    found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    found = [file for file in found if not file.name.endswith("_info.json") and not file.name.endswith("_infos.json")]
    shards = {file: match[1] for file in found if (match := SHARD.match(file.name))}
    named = [f for f in found if (shards[f] == split if f in shards else names(f.relative_to(folder), split))]
    if named:
        return named
    if found and split == "train" and not any(names(file.relative_to(folder), one) for file in found for one in SPLITS):
        return found
    there = ", ".join(str(file.relative_to(folder)) for file in found[:8]) or "no data file at all"
    raise UserError(f"{folder} has no file for the split '{split}' (data.split): it has {there}.")


def names(file: Path, split: str) -> bool:
    return re.search(rf"(^|[/._-]){re.escape(split)}($|[/._-])", file.as_posix()) is not None


def lines_of(file: Path) -> Iterator[Labelled]:
    """The rows of a JSONL file; blank lines are no rows.

    Raises:
        UserError: it is compressed, and damaged: rows without number may be missing.
    """
    number = 0
    try:
        with opened(file) as stream:
            for number, line in enumerate(stream, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield f"{file}:{number}", parsed(text.rstrip())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}:{number + 1}: the compressed file is damaged or cut off here ({error}).") from error


def opened(file: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")


def parsed(line: bytes) -> Row | RowError:
    """The row in a line, or why there is none."""
    if b"\0" in line:
        return RowError(f"a NUL byte in column {line.index(0) + 1}: the file is damaged or not UTF-8")
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 from byte {error.start + 1} on")
    except json.JSONDecodeError as error:
        return RowError(f"not JSON: {error.msg} in column {error.colno}")
    except RecursionError:
        return RowError("nested too deeply")
    except RowError as error:
        return error
    except ValueError:  # Python reads integers of up to 4,300 digits
        return RowError("not JSON: a number of thousands of digits")
    return row if isinstance(row, dict) else RowError(f"a JSON {type(row).__name__} where an object should be")


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, in which every key stands once."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' stands twice")
    return row


def listed(file: Path) -> Iterator[Labelled]:
    """The rows of a .json file: one list, held in memory, or JSONL under another name.

    Raises:
        UserError: it is neither.
    """
    rows: object = None
    try:
        with opened(file) as stream:
            first = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if first != b"{":
            with opened(file) as stream:
                rows = json.loads(stream.read().decode("utf-8-sig"))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: the compressed file is damaged or cut off ({error}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON list: {error}.") from error
    if first == b"{":
        yield from lines_of(file)
        return
    if not isinstance(rows, list):
        raise UserError(f"{file}: a JSON {type(rows).__name__} where a list of rows should be.")
    for index, row in enumerate(rows):
        good = isinstance(row, dict)
        yield (
            f"{file}[row {index}]",
            row if good else RowError(f"a JSON {type(row).__name__} where an object should be"),
        )


def parquet(file: Path) -> Iterator[Labelled]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Without a buffer it holds the columns of a row group, which may be the whole file.
        with pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER) as opened_file:
            batches = opened_file.iter_batches(batch_size=BATCH)
            yield from numbered(file, (row for batch in batches for row in batch.to_pylist()))
    except (pyarrow.ArrowInvalid, OSError) as error:  # no such file, or a damaged page
        raise UserError(f"{file}: not a Parquet file, or a damaged one: {error}.") from error


def arrow(file: Path) -> Iterator[Labelled]:
    import pyarrow

    # Read, not mapped: pages of a map count as the process's own memory.
    with pyarrow.OSFile(str(file)) as source:
        try:
            batches: Iterable[pyarrow.RecordBatch] = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            try:
                whole = pyarrow.ipc.open_file(source)
            except pyarrow.ArrowInvalid as error:
                raise UserError(f"{file}: not an Arrow file: {error}.") from error
            batches = (whole.get_batch(index) for index in range(whole.num_record_batches))
        pieces = (batch.slice(start, BATCH) for batch in batches for start in range(0, batch.num_rows, BATCH))
        try:
            yield from numbered(file, (row for piece in pieces for row in piece.to_pylist()))
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{file}: a damaged Arrow file: {error}.") from error


def numbered(name: object, rows: Iterable[Mapping[str, object]]) -> Iterator[Labelled]:
    return ((f"{name}[row {index}]", row) for index, row in enumerate(rows))


READERS: dict[str, Callable[[Path], Iterator[Labelled]]] = {
    ".jsonl": lines_of,
    ".json": listed,
    ".parquet": parquet,
    ".arrow": arrow,
}


# The `datasets` library, imported only where it is used: it takes a second


def saved_by_datasets(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def from_saved(folder: Path, split: str) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(f"{folder}: a damaged dataset: {first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"{folder} has no split '{split}' (data.split): it has {', '.join(map(str, saved))}.")
        part, files = saved[split], folder / split
    else:
        part, files = saved, folder
    rows = cast(Iterable[Mapping[str, object]], part)
    return Rows(str(folder), digest_of(sorted(files.glob("*.arrow"))), lambda: numbered(folder, rows))


def from_hub(path: str, *, revision: str | None, subset: str | None, split: str) -> Rows:
    """A dataset of the hub, or of the local cache of the hub.

    Raises:
        UserError: it cannot be had.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(path, data_dir=subset, revision=revision, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"data.path={path}: neither a file or folder here nor a dataset that could be loaded from the hub "
            f"(revision {revision}, split {split}): {first_line(error.__cause__ or error)} "
            "On a machine without network, copy the dataset there and set data.path to the copy."
        ) from error
    assert isinstance(loaded, datasets.Dataset)
    rows = cast(Iterable[Mapping[str, object]], loaded)
    # The paths of the cached files hold the digest of the hub's own files.
    cached = json.dumps([loaded.cache_files, len(loaded), revision, split])
    return Rows(path, hashlib.sha256(cached.encode()).hexdigest(), lambda: numbered(path, rows))
