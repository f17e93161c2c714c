import gzip
import json
import re
from pathlib import Path

import pytest

from align_cli.data import rows
from align_cli.data.records import RowError
from align_cli.data.rows import Rows, open_rows
from align_cli.errors import UserError

ROWS = [{"prompt": f"p{k}", "response": f"é{k}"} for k in range(5)]


def opened(path: Path, split: str = "train", subset: str | None = None) -> Rows:
    return open_rows(str(path), revision=None, subset=subset, split=split)


def read(path: Path, split: str = "train") -> list[object]:
    return [row for _, row in opened(path, split).rows()]


def jsonl(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def errors(path: Path) -> dict[str, str]:
    return {where.removeprefix(str(path)): str(row) for where, row in opened(path).rows() if isinstance(row, RowError)}


def test_line_ends_blank_lines_and_a_byte_order_mark_are_no_part_of_a_row(tmp_path: Path) -> None:
    lines = b"\r\n\r\n".join(json.dumps(row).encode() for row in ROWS)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    assert read(tmp_path / "a.jsonl") == ROWS
    assert [where for where, _ in opened(tmp_path / "a.jsonl").rows()][1] == f"{tmp_path}/a.jsonl:3"


def test_compressed_files_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(jsonl(tmp_path / "plain" / "a.jsonl").read_bytes())
    assert read(tmp_path / "a.jsonl.gz") == ROWS


def test_a_compressed_file_that_was_cut_off_is_refused_as_rows_without_number_are_missing(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps({"n": k, "t": str(k * k) * 9}) + "\n" for k in range(999)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    good: list[object] = []
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d+: the compressed file is damaged or cut off here"):
        good += (row for _, row in opened(tmp_path / "a.jsonl.gz").rows())
    assert len(good) > 100 and not any(isinstance(row, RowError) for row in good[:-1])


def test_a_split_is_the_whole_name_of_the_hub_s_shards(tmp_path: Path) -> None:
    for name in ("train_prefs-00000-of-00002", "train_prefs-00001-of-00002", "train_sft-00000-of-00001", "README"):
        jsonl(tmp_path / "data" / f"{name}.jsonl")
    found = rows.files_of(tmp_path, "train_prefs")
    assert [file.name[:17] for file in found] == ["train_prefs-00000", "train_prefs-00001"]
    with pytest.raises(UserError, match="no file for the split 'train'"):
        rows.files_of(tmp_path, "train")


@pytest.mark.parametrize("error", [RuntimeError("Dataset scripts are no longer supported"), "generation"])
def test_what_datasets_cannot_load_is_one_sentence(error: object, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: object, **__: object) -> None:
        if isinstance(error, Exception):
            raise error
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from ValueError("columns differ")

    monkeypatch.setattr(datasets, "load_dataset", load)
    told = "no longer supported" if isinstance(error, Exception) else "columns differ"
    with pytest.raises(UserError, match=rf"data\.path=some/one: .*{told}"):
        rows.open_rows("some/one", revision=None, subset=None, split="train")


def test_each_bad_line_gives_its_place_and_its_reason(tmp_path: Path) -> None:
    lines = [b'{"a": 1}', b'{"a": 1', b"[1, 2]", b'{"a": "\0"}', b'{"a": "\xff"}', b'{"a": 1, "a": 2}', b'{"a": 3}']
    lines.append(b'{"a": ' + b"9" * 5000 + b"}")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = errors(tmp_path / "a.jsonl")
    assert list(found) == [":2", ":3", ":4", ":5", ":6", ":8"]
    wanted = [
        "not JSON: .* in column 8",
        "a JSON list where an object",
        "NUL byte in column 8",
        "not UTF-8",
        "'a' stands twice",
        "thousands of digits",
    ]
    for reason, pattern in zip(found.values(), wanted, strict=True):
        assert re.search(pattern, reason), (reason, pattern)


def test_deeply_nested_lines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[" * 200_000)
    assert errors(tmp_path / "a.jsonl") == {":1": "nested too deeply"}


def test_json_lists_and_jsonl_under_the_name_of_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert read(tmp_path / "a.json") == ROWS
    assert read(jsonl(tmp_path / "b.json")) == ROWS
    for name, held in (("cut", gzip.compress(b"[1, 2]")[:-4]), ("plain", b"[1, 2]")):
        (tmp_path / f"{name}.json.gz").write_bytes(held)
        with pytest.raises(UserError, match="the compressed file is damaged or cut off"):
            read(tmp_path / f"{name}.json.gz")
    (tmp_path / "c.json").write_text('"text"')
    with pytest.raises(UserError, match="a JSON str where a list of rows"):
        read(tmp_path / "c.json")


def test_parquet_and_arrow_rows_are_numbered(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    with pyarrow.OSFile(str(tmp_path / "c.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert read(tmp_path / name) == ROWS
        assert [where for where, _ in opened(tmp_path / name).rows()][4] == f"{tmp_path / name}[row 4]"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_binary_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not what it says" * 9)
    with pytest.raises(UserError, match=name):
        read(tmp_path / name)


def test_folders_are_read_by_the_split_in_the_names_of_their_files(tmp_path: Path) -> None:
    jsonl(tmp_path / "data" / "train-00000-of-00002.jsonl", ROWS[:2])
    jsonl(tmp_path / "data" / "train-00001-of-00002.jsonl", ROWS[2:])
    jsonl(tmp_path / "test" / "part.jsonl", ROWS[:1])
    jsonl(tmp_path / ".cache" / "train.jsonl", ROWS)
    assert read(tmp_path) == ROWS
    assert read(tmp_path, "test") == ROWS[:1]
    with pytest.raises(UserError, match=r"no file for the split 'dev' \(data\.split\): it has data/train-0"):
        read(tmp_path, "dev")


def test_a_folder_whose_files_name_no_split_is_all_for_training(tmp_path: Path) -> None:
    jsonl(tmp_path / "evol.jsonl", ROWS[:2])
    jsonl(tmp_path / "flan.jsonl", ROWS[2:])
    assert read(tmp_path) == ROWS
    with pytest.raises(UserError, match="'test'"):
        read(tmp_path, "test")


def test_a_subset_is_a_folder_of_the_dataset(tmp_path: Path) -> None:
    jsonl(tmp_path / "one" / "train.jsonl", ROWS[:2])
    jsonl(tmp_path / "two" / "train.jsonl", ROWS[2:])
    assert [row for _, row in opened(tmp_path, subset="two").rows()] == ROWS[2:]
    with pytest.raises(UserError, match=r"no folder 'three': set data\.subset"):
        opened(tmp_path, subset="three")


def test_folders_saved_by_datasets_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(ROWS)
    part.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": part, "test": part.select([3])}).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "two", "test") == ROWS[3:4]
    with pytest.raises(UserError, match="no split 'dev'"):
        read(tmp_path / "two", "dev")


def test_the_identity_changes_with_the_rows_and_not_with_the_place(tmp_path: Path) -> None:
    one, same, other = (jsonl(tmp_path / name / "a.jsonl") for name in ("one", "same", "other"))
    jsonl(other, ROWS[::-1])
    assert opened(one).identity == opened(same).identity != opened(other).identity


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "a/b/c", "no such thing"])
def test_a_missing_file_is_not_looked_for_on_the_hub(path: str) -> None:
    with pytest.raises(UserError, match=r"data\.path=.*no such file or folder"):
        open_rows(path, revision=None, subset=None, split="train")


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"unknown kind of file\. Known: \.jsonl"):
        opened(tmp_path / "a.csv")


def test_hub_datasets_are_loaded_by_id_revision_folder_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(path: str, **options: object) -> object:
        asked.append((path, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = open_rows("someone/pairs", revision="abc", subset="part", split="train")
    assert [row for _, row in rows.rows()] == ROWS
    assert next(rows.rows())[0] == "someone/pairs[row 0]"
    assert asked == [("someone/pairs", {"data_dir": "part", "revision": "abc", "split": "train"})]


def test_without_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(path: str, **options: object) -> object:
        raise ConnectionError("Couldn't reach 'someone/pairs' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"data\.path=someone/pairs.*Couldn't reach.*set data\.path to the copy"):
        open_rows("someone/pairs", revision=None, subset=None, split="train")
