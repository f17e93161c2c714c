"""What was paid for survives kills, damage and company."""

import multiprocessing
from pathlib import Path

import pytest

from align_cli.journal import Journal, name_of


def journal(path: Path) -> Journal:
    return Journal(path, costs="values are lost")


def test_a_value_is_found_by_whoever_opens_the_file_next(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "journal.jsonl"
    journal(path).add("a", {"text": "é\n\ud800"})
    assert journal(path)["a"] == {"text": "é\n\ud800"}
    assert len(journal(path)) == 1 and "b" not in journal(path)


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_cut_by_a_kill_costs_itself_alone(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    first = journal(path)
    first.add("a", {"text": "one"})
    first.add("b", {"text": "two"})
    path.write_bytes(path.read_bytes()[:-cut])
    again = journal(path)
    assert "a" in again and "b" not in again
    again.add("c", {"text": "three"})
    again.add("b", {"text": "two"})
    assert {name: journal(path)[name]["text"] for name in "abc"} == {"a": "one", "b": "two", "c": "three"}


def test_a_damaged_line_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal(path).add("a", {"text": "one"})
    path.write_bytes(path.read_bytes().replace(b"one", b"two") + b"[]\n17\n\xff\xfe\n")
    assert len(journal(path)) == 0


def test_of_two_values_of_one_name_the_earlier_holds(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    one, two = journal(path), journal(path)
    one.add("a", {"text": "earlier"})
    two.add("a", {"text": "later"})
    assert journal(path)["a"] == {"text": "earlier"}
    one.add("b", {"text": "new"})
    two.refresh()
    assert two["b"] == {"text": "new"}


def _append(path: Path, who: int) -> None:
    writer = journal(path)
    for number in range(50):
        writer.add(f"{who}-{number}", {"text": "x" * 3000})


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    spawn = multiprocessing.get_context("spawn")  # to fork a process that has threads may leave a lock held
    writers = [spawn.Process(target=_append, args=(path, who)) for who in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(journal(path)) == 150


def test_a_folder_that_cannot_be_written_is_said_once_and_values_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    kept = journal(tmp_path / "file" / "journal.jsonl")
    kept.add("a", {"text": "one"})
    kept.add("b", {"text": "two"})
    assert kept["a"] == {"text": "one"}
    assert capsys.readouterr().err.count("values are lost") == 1


def test_a_name_depends_on_content_and_not_on_the_order_of_keys() -> None:
    assert name_of({"a": 1, "b": [2]}) == name_of({"b": [2], "a": 1}) != name_of({"a": 1, "b": [3]})
