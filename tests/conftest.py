"""What the tests share: a cache of their own, and runs that take a second (`small_runs`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from forks import Forked, Forks

from align_cli import judges
from align_cli.reproduction import jobs


@pytest.fixture(scope="session", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache or Weights & Biases account, and none takes all cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights with its tokenizer."""
    return small_runs.build_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def reader_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of random weights that reads any text and chats."""
    return small_runs.build_reader(tmp_path_factory.mktemp("models") / "reader", seed=0)


@pytest.fixture(scope="session")
def ragged_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with 2 and with 4 scored completions."""
    return small_runs.write_rows(tmp_path_factory.mktemp("rows") / "ragged.jsonl", responses=(2, 4, 4), rows=26)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with 2 scored completions."""
    return small_runs.write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", responses=(2,), rows=26)


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five rows of each dataset that the recipes train on."""
    return small_runs.write_few_rows(tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """`align` in processes of its own."""
    server = Forks(tmp_path_factory.mktemp("forks") / "log")
    yield server
    server.close()


@pytest.fixture
def forked(forks: Forks, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Jobs are forked in milliseconds; what was started."""
    started: list[tuple[str, ...]] = []

    def process(arguments: tuple[str, ...], environment: dict[str, str], log: Path) -> Any:
        started.append(arguments)
        return Forked(forks, arguments, log)

    monkeypatch.setattr(jobs, "_process", process)
    return started


@pytest.fixture
def no_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the environment names a judge, and none has answered before."""
    for name in (*judges.URLS, *judges.KEYS, judges.MODEL):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
