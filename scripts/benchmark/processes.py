"""A contender as a process of its own, watched from outside: when it said what, its peak memory, who else computed."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
CPUS = os.cpu_count() or 1


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: its exit code.
        lines: what it said, each with the seconds since it was started.
        seconds: from start to end.
        peak_bytes: resident memory at most, of the process or of the largest of its children; not less than this
            process's own, which a new process begins with on Linux.
        load: the machine's load average over a minute when it started.
        others: share of the machine's processor time that other processes took meanwhile.
    """

    code: int
    lines: list[tuple[float, str]] = field(repr=False)
    seconds: float
    peak_bytes: int
    load: float
    others: float

    def tail(self, count: int = 12) -> str:
        """The last lines."""
        return "\n".join(line for _, line in self.lines[-count:])


def run(command: Sequence[str], *, environment: Mapping[str, str], folder: Path, limit: float) -> Ended:
    """Start, watch and await a process.

    Args:
        environment: its whole environment.
        folder: where it starts.
        limit: seconds after which it is killed.
    """
    load = os.getloadavg()[0]
    busy, own = _busy(), time.process_time()
    begun = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=dict(environment),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        lines = _listen(process.stdout.fileno(), begun, limit)
        if time.perf_counter() - begun >= limit:
            os.killpg(process.pid, signal.SIGKILL)
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        os.wait4(process.pid, 0)
        raise
    finally:
        process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    mine = usage.ru_utime + usage.ru_stime + time.process_time() - own
    others = min(1.0, max(0.0, (_busy() - busy - mine) / (seconds * CPUS)))  # of truncated clocks
    return Ended(process.returncode, lines, seconds, usage.ru_maxrss * 1024, load, others)


def _listen(descriptor: int, begun: float, limit: float) -> list[tuple[float, str]]:
    """Lines until the end of the stream or of the time."""
    import select

    lines: list[tuple[float, str]] = []
    rest = b""
    while (left := limit - (time.perf_counter() - begun)) > 0:
        ready, _, _ = select.select([descriptor], [], [], left)
        if not ready:
            break
        block = os.read(descriptor, 1 << 16)
        now = time.perf_counter() - begun
        if not block:
            break
        *whole, rest = (rest + block).replace(b"\r", b"\n").split(b"\n")
        lines += [(now, line.decode(errors="replace")) for line in whole if line.strip()]
    if rest.strip():
        lines.append((time.perf_counter() - begun, rest.decode(errors="replace")))
    return lines


def _busy() -> float:
    """Processor seconds that this machine has spent on anything but idling and waiting, and that its host took away."""
    words = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = (int(word) for word in words[:8])
    return (user + nice + system + irq + softirq + steal) / TICK
