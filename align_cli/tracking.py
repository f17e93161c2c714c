"""What a run says while it runs: `metrics.jsonl`, Weights & Biases, and progress on the terminal.

`metrics.jsonl` is the truth, the rest is derived from it. Only rank 0 tracks; the others hold a `Silent`.
"""

import json
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from align_cli import terminal
from align_cli.errors import RunError, UserError, first_line
from align_cli.ranges import Count, Positive
from align_cli.rundir import Scalar, flatten, plain, write_atomic

METRICS = "metrics.jsonl"
WANDB_ID = "wandb.json"


@dataclass(frozen=True, kw_only=True)
class Track:
    """The `track` section: how a run is tracked; the keys are explained in `conf/track/wandb.yaml`."""

    name: Literal["wandb", "none"]
    project: str | None
    group: str | None
    run_name: str | None
    every: Count
    lines: Positive


class Silent:
    """The tracker of a rank that does not track."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record what was measured at a step, all of it at once: a step has one line."""

    def keep(self) -> None:
        """Make durable what was recorded: a checkpoint that follows must not outlive it."""

    def progress(self, step: int, tokens_per_second: float, loss: float | None = None) -> None:
        """Show how far the run is."""

    def close(self, summary: Mapping[str, Scalar]) -> None:
        """The run is finished, with these figures."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaving without `close` marks the run as unfinished."""


class Tracker(Silent):
    """The tracker of rank 0.

    Args:
        run_dir: an existing folder.
        config: the resolved configuration; W&B shows it with dots, `algo.alpha`.
        steps: optimizer steps of the whole run.
        resumed: the step that the run goes on from, None for a new run. Lines after it are dropped, the steps will
            be run again.
    """

    def __init__(
        self, run_dir: Path, config: Mapping[str, Any], track: Track, *, steps: int, resumed: int | None
    ) -> None:
        self._last = _keep_until(run_dir / METRICS, resumed)
        self._file = open(run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__
        self._show = _Bar(steps, resumed or 0) if terminal.is_live(sys.stderr) else _Lines(steps, track.lines)
        self._wandb = _start_wandb(run_dir, config, track) if track.name == "wandb" else None
        self._finished = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step <= self._last:
            raise ValueError(f"step {step} is logged after step {self._last}: a step has one line")
        self._last = step
        try:
            self._file.write(
                json.dumps({"step": step, **{name: plain(value) for name, value in metrics.items()}}) + "\n"
            )
            self._file.flush()
        except OSError as error:
            raise RunError(f"{self._file.name} cannot be written: {error.strerror}") from error
        self._tell(lambda run: run.log(dict(metrics), step=step))

    def keep(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(f"{self._file.name} cannot be written: {error.strerror}") from error

    def progress(self, step: int, tokens_per_second: float, loss: float | None = None) -> None:
        self._show.update(step, tokens_per_second, loss)

    def close(self, summary: Mapping[str, Scalar]) -> None:
        self._finished = True
        self._tell(lambda run: run.summary.update(dict(summary)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a terminal that was closed
            self._show.stop()
        with suppress(OSError):  # the disk was full, and `log` has said so
            self._file.close()
        self._tell(lambda run: run.finish(exit_code=0 if self._finished else 1))

    def _tell(self, what: Callable[[Any], object]) -> None:
        """Tell the run of W&B, whose service is a process of its own and may have been killed."""
        if self._wandb is None:
            return
        try:
            what(self._wandb)
        except Exception as error:
            self._wandb = None
            terminal.warn(f"Weights & Biases has ended ({first_line(error)}); {METRICS} goes on without it")


# --- metrics.jsonl


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The logged lines of a run; a last line that a kill cut short is left out.

    Raises:
        ValueError: another line is not JSON.
    """
    path = run_dir / METRICS
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    rows: list[dict[str, Any]] = []
    # what follows the last line break was cut short, or is empty
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: this line is not JSON: {line[:80]!r}") from error
    return rows


def _keep_until(path: Path, resumed: int | None) -> int:
    """Drop the lines after step `resumed`, all of them for a new run. Returns the last step that stays, or -1."""
    try:
        rows = [] if resumed is None else [row for row in read_metrics(path.parent) if row["step"] <= resumed]
    except ValueError as error:
        raise UserError(f"{error}. Mend or remove the line; nothing but the file's own curve depends on it.") from error
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1]["step"] if rows else -1


# --- Weights & Biases


def wandb_mode() -> str:
    """What WANDB_MODE says; without it, online where there is a key and offline where there is none."""
    named = os.environ.get("WANDB_MODE")
    if named:
        return named
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_entry() else "offline"


def _has_netrc_entry() -> bool:
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):  # no such file, or none that can be read
        return False


def _start_wandb(run_dir: Path, config: Mapping[str, Any], track: Track) -> Any:
    import wandb as client
    from wandb.errors import Error as WandbError

    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it would advertise itself where a judge's client is loaded
    identity = run_dir / WANDB_ID
    if identity.exists():
        run_id = json.loads(identity.read_text(encoding="utf-8"))["id"]
    else:
        run_id = uuid.uuid4().hex[:12]
        write_atomic(identity, json.dumps({"id": run_id, "project": track.project}) + "\n")

    def start(mode: str) -> Any:
        return client.init(
            project=track.project,
            group=track.group,
            name=track.run_name or run_dir.resolve().name,
            id=run_id,
            resume="allow",
            config=flatten(config),
            dir=run_dir,
            mode=mode,  # pyright: ignore[reportArgumentType] - WANDB_MODE may be anything, the client checks it
            # nothing of the command line, the environment, the code or the machine leaves it; the terminal is ours
            settings=client.Settings(
                console="off",
                silent=True,
                quiet=True,
                save_code=False,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
            ),
        )

    mode = wandb_mode()
    try:
        return start(mode)
    except (WandbError, ValueError) as error:  # the latter where WANDB_MODE is a word that it does not know
        if mode == "offline":
            raise
        terminal.warn(
            f"Weights & Biases cannot be reached ({first_line(error)}); this run is recorded offline in {run_dir}/wandb"
        )
        os.environ["WANDB_MODE"] = "offline"  # which the client reads, too
        return start("offline")


def publish(run_dir: Path, config: Mapping[str, Any], name: str, page: str, *, step: int) -> None:
    """Show a page in the W&B run of a finished run, where it has one; a run of W&B that is offline keeps it there.

    Args:
        config: as `config.yaml` has it.
        page: HTML that needs nothing beside itself.
        step: after all that the run has logged.
    """
    run = _again(run_dir, config)
    if run is None:
        return
    import wandb as client

    run.log({name: client.Html(page, inject=False)}, step=max(step, run.step))  # another report came before
    run.finish()


def publish_of_sweep(folder: Path, configs: Sequence[Mapping[str, Any]], name: str, page: str) -> None:
    """Show a page about several runs in a W&B run of their group; where they are of no one group, do nothing.

    Args:
        folder: of the sweep; what W&B writes goes there, and another page goes to the same W&B run.
        configs: of its runs, as `config.yaml` has them.
        page: HTML that needs nothing beside itself.
    """
    tracks = [config.get("track") for config in configs]
    named = [(each.get("name"), each.get("project"), each.get("group")) for each in tracks if isinstance(each, Mapping)]
    if len(named) < len(tracks) or len(set(named)) != 1 or named[0][0] != "wandb" or named[0][2] is None:
        return
    run = _start_wandb(folder, {}, replace(Track(**dict(tracks[0] or {})), run_name=f"{named[0][2]}, report"))
    import wandb as client

    run.log({name: client.Html(page, inject=False)})
    run.finish()


@dataclass(frozen=True)
class Table:
    """Rows under headings; a cell is a number or a text."""

    headings: list[str]
    rows: list[list[str | float]]


def add(run_dir: Path, config: Mapping[str, Any], figures: Mapping[str, Scalar], tables: Mapping[str, Table]) -> None:
    """Add figures and tables to the W&B run of a finished run, where it has one.

    Args:
        config: as `config.yaml` has it.
    """
    run = _again(run_dir, config)
    if run is None:
        return
    import wandb as client

    for name, table in tables.items():
        headings: Any = table.headings
        rows: Any = table.rows
        run.log({name: client.Table(columns=headings, data=rows)})
    run.summary.update(dict(figures))
    run.finish()


def _again(run_dir: Path, config: Mapping[str, Any]) -> Any:
    """The W&B run of a finished run; None where it has none."""
    track = config.get("track")
    if not (run_dir / WANDB_ID).is_file() or not isinstance(track, Mapping) or track.get("name") != "wandb":
        return None
    return _start_wandb(run_dir, config, Track(**track))


# --- the terminal


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Lines:
    """A line every few seconds: what a log file or a batch system shows."""

    def __init__(self, steps: int, seconds: float) -> None:
        self._steps = steps
        self._seconds = seconds
        self._first: tuple[float, int] | None = None  # time and step of the first update
        self._said = float("-inf")

    def update(self, step: int, tokens_per_second: float, loss: float | None) -> None:
        now = time.monotonic()
        first_time, first_step = self._first = self._first or (now, step)
        if now - self._said < self._seconds and step < self._steps:
            return
        self._said = now
        parts = [f"step {step}/{self._steps}"]
        parts += [] if loss is None else [f"loss {loss:.4f}"]
        parts += [f"{tokens_per_second:,.0f} tokens/s"]
        if step > first_step:
            parts += [f"{_clock((now - first_time) / (step - first_step) * (self._steps - step))} left"]
        terminal.say("  ".join(parts))

    def stop(self) -> None:
        pass


class _Bar:
    """A bar that redraws itself on a terminal, below what is said meanwhile: rich takes that from standard error."""

    def __init__(self, steps: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, loss="", speed="")
        self._bar.start()

    def update(self, step: int, tokens_per_second: float, loss: float | None) -> None:
        self._bar.update(
            self._task,
            completed=step,
            loss="" if loss is None else f"loss {loss:.4f}",
            speed=f"{tokens_per_second:,.0f} tokens/s",
        )

    def stop(self) -> None:
        self._bar.stop()
