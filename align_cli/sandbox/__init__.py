"""Running generated code: apart, with little of everything, and only where the user has said so (`code.run=true`).

`code.runner=process` starts `jail.py`, which keeps the program from the network, from all files but an empty folder,
and from other processes, by what the system offers: namespaces of Linux, or for root where there are none another
user. `code.runner=container` starts docker or podman. What is in force was tried before the first program, and is
said with every figure (`Sandbox.isolation`). Where nothing of this is to be had, nothing is run.
"""

import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from align_cli.errors import UserError
from align_cli.ranges import Count, NotEmpty, Positive
from align_cli.sandbox import jail

OUTPUT = 1 << 16  # bytes that a program may print
PATIENCE = 30.0  # seconds that starting and cleaning up may take beyond the program's own
USERS = range(1_600_000_000, 1_700_000_000)  # numbers of users that no system gives away
NOBODY = 65534
HERE = Path(__file__).parent

Why = Literal["passed", "failed", "exited", "killed", "time", "memory", "output"]


@dataclass(frozen=True, kw_only=True)
class Code:
    """The `code` section."""

    run: bool
    runner: Literal["process", "container"]
    image: NotEmpty
    seconds: Positive
    memory_mb: Count
    processes: Count
    file_mb: Count


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a program.

    Attributes:
        why: passed: the last test was done; failed: an error, or a test did not hold; exited: it ended before its
            tests did; killed: by a signal; time, memory, output: it asked for more than it may have.
        detail: the error in its own words, which nobody vouches for.
    """

    why: Why
    detail: str

    @property
    def passed(self) -> bool:
        return self.why == "passed"


@dataclass(frozen=True)
class Sandbox:
    """A place where programs run.

    Attributes:
        options: the `code` section.
        level: how they are kept apart: namespaces, user or container.
        path: of the interpreter that runs them, or of the container engine.
    """

    options: Code
    level: Literal["namespaces", "user", "container"]
    path: str

    @property
    def isolation(self) -> str:
        """What is in force, for whoever reads a figure."""
        if self.level == "container":
            return f"{Path(self.path).name} container of {self.options.image}: no network, read-only"
        if self.level == "namespaces":
            return "namespaces: no network, no files but the interpreter's, read-only, and a folder in memory"
        return "another user: network and the files that all may read or write are NOT kept away"

    def run(self, program: str, tests: str) -> Verdict:
        """Run the program, then the tests in its names.

        Raises:
            UserError: the sandbox itself does not work (any more).
        """
        secret = secrets.token_hex(16)
        given = {"program": program, "tests": tests, "secret": secret}
        told = self._contained(given) if self.level == "container" else self._jailed(given)
        if told["failed"] is not None:
            raise UserError(f"code.runner={self.options.runner}: no program can be started: {told['failed']}")
        return judged(told, secret)

    def _jailed(self, given: dict[str, str]) -> jail.Request:
        with tempfile.TemporaryDirectory(prefix="align-code-", ignore_cleanup_errors=True) as folder:
            uid = random.SystemRandom().choice(USERS) if os.getuid() == 0 else None
            if uid is not None:
                try:
                    os.chown(folder, uid, uid)
                except OSError as error:  # in a user namespace that has no such user
                    raise UserError(
                        f"code.runner=process: no program can be started: user {uid}: {error.strerror}"
                    ) from error
            request = self.request(given, folder, uid)
            supervisor = subprocess.Popen(
                [self.path, "-I", "-S", "-B", str(HERE / "jail.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                cwd=folder,
                start_new_session=True,
            )
            try:
                wire = json.dumps(request).encode()
                answer, complaint = supervisor.communicate(wire, timeout=self.options.seconds + PATIENCE)
            finally:  # it has ended, or it is too late, or the user has lost patience
                if supervisor.poll() is None:
                    os.killpg(supervisor.pid, signal.SIGKILL)
                    supervisor.wait()
        if supervisor.returncode != 0:
            return {"failed": complaint.decode(errors="replace").strip().rpartition("\n")[2]}
        return json.loads(answer)

    def request(self, given: dict[str, str], folder: str, uid: int | None) -> jail.Request:
        """What the supervisor is told: the program, an empty folder, the user to become, and the limits."""
        return {
            **given,
            "level": self.level,
            "uid": uid,
            "folder": folder,
            "python": self.path,
            "readable": readable(self.path),
            "inside": (HERE / "inside.py").read_text(encoding="utf-8"),
            "output_bytes": OUTPUT,
            "seconds": self.options.seconds,
            "memory_mb": self.options.memory_mb,
            "processes": self.options.processes,
            "file_mb": self.options.file_mb,
        }

    def _contained(self, given: dict[str, str]) -> jail.Request:
        name = f"align-{secrets.token_hex(8)}"
        client = subprocess.Popen(
            container(self.path, name, self.options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert client.stdin is not None and client.stdout is not None and client.stderr is not None
        try:
            try:
                client.stdin.write(json.dumps(given).encode())
                client.stdin.close()
            except BrokenPipeError:
                pass  # it has ended already; its output says why
            streams = {"report": client.stdout.fileno(), "output": client.stderr.fileno()}
            seconds = self.options.seconds + PATIENCE
            told, ended = jail.listen(streams, until="report", seconds=seconds, most=OUTPUT)
        finally:
            if client.poll() is None:
                # the client's death is not the container's
                subprocess.run([self.path, "kill", name], capture_output=True, timeout=PATIENCE, check=False)
                client.kill()
            status = client.wait()
            client.stdout.close()
            client.stderr.close()
        texts = {stream: text.decode(errors="replace") for stream, text in told.items()}
        # 125 to 127 are the engine's own: it could not start the container, or the container its program
        failed = texts["output"].strip() if status in (125, 126, 127) and not texts["report"] else None
        return {**texts, "ended": ended, "status": status << 8 if status >= 0 else None, "failed": failed}


def judged(told: jail.Request, secret: str) -> Verdict:
    """The verdict on what a program said and how it ended."""
    if told["ended"] == "time":
        return Verdict("time", "it did not end in time")
    if told["ended"] == "output":
        return Verdict("output", f"it printed more than {OUTPUT} bytes")
    if told["report"].endswith(secret):
        return Verdict("passed", "")
    status = told["status"]
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return Verdict("time", "it used more time of the processor than it may")
        return Verdict("killed", f"by signal {number}")
    try:
        said = json.loads(told["report"])
        error, message = str(said["error"]), str(said["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return Verdict("exited", "it ended before its tests were done")
    if error in ("SystemExit", "KeyboardInterrupt"):
        return Verdict("exited", f"{error}: {message}")
    return Verdict("memory" if error == "MemoryError" else "failed", f"{error}: {message}")


def opened(options: Code) -> Sandbox:
    """The strongest sandbox that can be had, tried.

    Raises:
        UserError: code is not to be run, or cannot be run safely enough.
    """
    if not options.run:
        raise UserError(
            "code.run=false: this evaluation runs programs that the model has written; code.run=true says that they "
            "may be, each in a process of its own with limits, or with code.runner=container in a container."
        )
    if options.runner == "container":
        return _with_engine(options)
    if not sys.platform.startswith("linux"):
        raise UserError("code.runner=process: works on Linux alone; use code.runner=container here.")
    problems: list[str] = []
    for level in ("namespaces", "user") if os.getuid() == 0 else ("namespaces",):
        sandbox = Sandbox(options, level, os.path.realpath(sys.executable))
        # the first program of a level may meet a slow disk
        patient = replace(sandbox, options=replace(options, seconds=max(options.seconds, PATIENCE)))
        try:
            verdict = patient.run("", PROBE if level == "namespaces" else "")
        except UserError as error:
            problems.append(str(error).rpartition("started: ")[2])
            continue
        if verdict.passed:
            return sandbox
        problems.append(f"{verdict.why} ({verdict.detail})")
    raise UserError(
        f"code.runner=process: this system does not keep a program apart ({'; '.join(problems)}); "
        "use code.runner=container, or a machine that allows namespaces."
    )


# what the level `namespaces` promises
PROBE = """
import os, socket
assert [name for _, name in socket.if_nameindex()] in ([], ["lo"]), "there is a network"
assert os.listdir("/") == [] or not os.access("/", os.W_OK), "the root is writable"
assert os.getppid() == 1, "other processes are in sight"
"""


def readable(python: str) -> list[str]:
    """What an interpreter reads: its own folders and the system's libraries, outer ones first, none within another."""
    wanted = ["/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/etc/ld.so.cache", "/nix/store", sys.base_prefix]
    kept: list[str] = []
    for path in (*wanted, str(Path(python).parent)):
        if os.path.lexists(path) and not any(Path(path).is_relative_to(outer) for outer in kept):
            kept.append(path)
    return kept


def _with_engine(options: Code) -> Sandbox:
    problems: list[str] = []
    for name in ("docker", "podman"):
        engine = shutil.which(name)
        if engine is None:
            continue
        sandbox = Sandbox(options, "container", engine)
        try:
            verdict = sandbox.run("", "")
        except UserError as error:
            problems.append(f"{name}: {str(error).rpartition('started: ')[2]}")
            continue
        if verdict.passed:
            return sandbox
        problems.append(f"{name}: {verdict.why} ({verdict.detail})")
    raise UserError(
        f"code.runner=container: neither docker nor podman runs a container here{': ' if problems else ''}"
        f"{'; '.join(problems)}. Install one, or use code.runner=process."
    )


def container(engine: str, name: str, options: Code) -> list[str]:
    """The command that runs `inside.py` in a container."""
    memory = f"{options.memory_mb}m"
    seconds = int(options.seconds) + 1
    return [
        engine,
        "run",
        "--rm",
        "--interactive",
        f"--name={name}",
        "--network=none",
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        f"--user={NOBODY}:{NOBODY}",
        f"--pids-limit={options.processes + 1}",
        f"--memory={memory}",
        f"--memory-swap={memory}",
        f"--ulimit=cpu={seconds}:{seconds}",
        f"--ulimit=fsize={options.file_mb << 20}:{options.file_mb << 20}",
        f"--ulimit=nofile={jail.FILES}:{jail.FILES}",
        "--ulimit=core=0:0",
        f"--tmpfs={jail.HOME}:rw,nosuid,nodev,size={options.file_mb}m,mode=1777",
        f"--workdir={jail.HOME}",
        options.image,
        "python",
        "-I",
        "-B",
        "-c",
        (HERE / "inside.py").read_text(encoding="utf-8"),
    ]
