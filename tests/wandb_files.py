"""Reads what Weights & Biases wrote offline: its files are LevelDB logs of protocol buffers."""

import importlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_MAGIC = 7


def _records(data: bytes) -> Iterator[bytes]:
    """https://github.com/google/leveldb/blob/main/doc/log_format.md, after a header of 7 bytes."""
    at, parts = _MAGIC, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # no header fits: the rest of the block is padding
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + length > len(data):  # still being written
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _parsed(path: Path) -> list[Any]:
    """The records of a file. Its writer is a process of its own, which may be at it after `finish` has returned."""
    protocol = importlib.import_module("wandb.proto.wandb_internal_pb2")
    deadline = time.monotonic() + 60
    while True:
        records = [protocol.Record.FromString(data) for data in _records(path.read_bytes())]
        if any(record.HasField("exit") for record in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.05)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """For each offline file of a finished run: id, project, group, config, steps (a dict each) and summary."""
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        run: dict[str, Any] = {"config": {}, "steps": [], "summary": {}}
        for record in _parsed(path):
            if record.HasField("run"):
                run |= {"id": record.run.run_id, "project": record.run.project, "group": record.run.run_group}
                run["config"] |= _items(record.run.config.update)
            if record.HasField("history"):
                run["steps"].append(_items(record.history.item))
            if record.HasField("summary"):
                run["summary"] |= _items(record.summary.update)
        found.append(run)
    return found
