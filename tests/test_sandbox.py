"""Generated code is contained, whatever it tries, and right programs are told from wrong ones."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from forks import HANGS

from align_cli import sandbox
from align_cli.errors import UserError
from align_cli.sandbox import HERE, Code, Sandbox, Verdict, judged

OPTIONS = Code(
    run=True, runner="process", image="python:3.12-slim", seconds=20.0, memory_mb=256, processes=8, file_mb=2
)
SYSTEM_PYTHON = "/usr/bin/python3"  # which any user may run
RIGHT = "def add(a, b):\n    return a + b\n"
TESTS = "def check(f):\n    assert f(1, 2) == 3\n    assert f(-1, 1) == 0\n\ncheck(add)\n"

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the process runner is Linux's")
as_root = pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root, to become another user")
with_python = pytest.mark.skipif(not Path(SYSTEM_PYTHON).exists(), reason=f"there is no {SYSTEM_PYTHON}")


@pytest.fixture(scope="module")
def box() -> Sandbox:
    try:
        return sandbox.opened(OPTIONS)
    except UserError as error:
        pytest.skip(str(error))


@linux
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux, to ask what this system allows")
def test_namespaces_are_used_wherever_the_system_allows_them() -> None:
    """Without this, the tests below would be skipped where the sandbox is broken."""
    asked = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork"]
    asked += [] if os.getuid() == 0 else ["--user"]
    if subprocess.run([*asked, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system allows no namespaces")
    assert sandbox.opened(OPTIONS).level == "namespaces"


@linux
def test_a_right_program_passes_and_wrong_ones_say_what_is_wrong(box: Sandbox) -> None:
    assert box.run(RIGHT, TESTS) == Verdict("passed", "")
    assert box.run(RIGHT.replace("+", "-"), TESTS).why == "failed"
    assert box.run("def add(a, b)\n    return", TESTS).detail.startswith("SyntaxError")
    assert box.run("def other(): pass", TESTS).detail == "NameError: name 'add' is not defined"


@linux
def test_programs_define_classes_and_use_their_folder_and_processes(box: Sandbox) -> None:
    program = """
import os, tempfile
from dataclasses import dataclass

@dataclass
class Pair:
    a: "int"

with open("note", "w") as file:
    file.write("kept")
with tempfile.TemporaryFile() as file:
    file.write(b"kept")
child = os.fork()
if child == 0:
    os._exit(7)
"""
    tests = "assert Pair(1) == Pair(1) and open('note').read() == 'kept'\nassert os.waitpid(child, 0)[1] == 7 << 8"
    assert box.run(program, tests) == Verdict("passed", "")


# what a program does, and what may become of it
HOSTILE: dict[str, tuple[str, set[str]]] = {
    "fork_bomb": ("import os\nwhile True:\n    os.fork()", {"failed", "exited", "time", "output"}),
    "patient_fork_bomb": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        {"time"},
    ),
    "memory": ("held = []\nwhile True:\n    held.append(bytearray(1 << 24))", {"memory"}),
    "endless_output": ("while True:\n    print('x' * 1000, flush=True)", {"output"}),
    "endless_report": ("import os\nwhile True:\n    os.write(3, b'x' * 1000)", {"output"}),
    "endless_loop": ("while True:\n    pass", {"time"}),
    "sleep": ("import time\ntime.sleep(1000)", {"time"}),
    "ignores_signals": (
        "import signal, time\nfor n in (1, 2, 3, 13, 14, 15, 24):\n    signal.signal(n, signal.SIG_IGN)\n"
        "while True:\n    time.sleep(1)",
        {"time"},
    ),
    "large_file": ("with open('big', 'wb') as file:\n    file.write(b'x' * (3 << 20))", {"failed"}),
    "many_files": (
        "for n in range(9):\n    with open(str(n), 'wb') as file:\n        file.write(b'x' * (1 << 20))",
        {"failed"},
    ),
    "open_files": ("held = [open('/dev/null') for _ in range(100)]", {"failed"}),
    "exits": ("import sys\nsys.exit(0)", {"exited"}),
    "exits_at_once": ("import os\nos._exit(0)", {"exited"}),
    "exits_in_a_test": ("import os\ndef add(a, b):\n    os._exit(0)", {"exited"}),
    "raises_exit_in_a_test": ("def add(a, b):\n    raise SystemExit(0)", {"exited"}),
    "claims_success": (
        "import os\nprint('passed')\nfor n in (1, 2, 3, 4):\n    try:\n        os.write(n, b'passed')\n"
        "    except OSError:\n        pass\nos._exit(0)",
        {"exited"},
    ),
    "kills_all": ("import os, signal\nos.kill(-1, signal.SIGKILL)", {"failed", "killed", "exited"}),
    "kills_its_parent": (
        "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(0.2)\nos.killpg(0, signal.SIGKILL)",
        {"failed", "killed", "exited"},
    ),
    "crashes": ("import ctypes\nctypes.string_at(0)", {"killed"}),
    "deep": ("def deep(n):\n    return deep(n + 1)\ndeep(0)", {"failed"}),
    "runs_no_tests": ("import builtins\nbuiltins.exec = lambda *_: None\nbuiltins.vars = lambda *_: {}", {"failed"}),
    "compiles_no_tests": ("import builtins\nbuiltins.compile = lambda *_, **__: (lambda: None).__code__", {"failed"}),
    "writes_for_the_tests": ("import os\nos.write = os._exit = lambda *_: None", {"failed"}),
    "closes_everything": ("import os\nos.closerange(0, 100)\nos._exit(0)", {"exited"}),
    "half_a_character": ("raise ValueError('\\ud800' * 9)", {"failed"}),
}
QUICK = {"patient_fork_bomb", "endless_loop", "sleep", "ignores_signals"}  # nothing but the time ends these


@linux
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(box: Sandbox, name: str) -> None:
    program, expected = HOSTILE[name]
    box = replace(box, options=replace(OPTIONS, seconds=1.0)) if name in QUICK else box
    verdict = box.run(program, TESTS)
    assert verdict.why in expected, verdict


def reaches(box: Sandbox, program: str) -> str:
    """What a program finds, said as an error."""
    verdict = box.run(program, "raise LookupError(repr(found))")
    assert verdict.why == "failed", verdict
    return verdict.detail.removeprefix("LookupError: ")


@linux
def test_the_environment_and_the_command_line_tell_nothing(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = reaches(box, "import os, sys\nfound = sorted(os.environ), sys.argv, sys.stdin.read()")
    assert "hf_secret" not in found and "HF_TOKEN" not in found and found.endswith("['-c'], '')")


@linux
def test_the_secret_is_nowhere_to_be_read(box: Sandbox) -> None:
    """Neither in a file that is open, nor in the command, nor in the environment."""
    program = """
import os, re
found = []
for n in range(64):
    try:
        os.lseek(n, 0, os.SEEK_SET)
        found.append(os.read(n, 1 << 16))
    except OSError:
        pass
for name in ("cmdline", "environ"):
    try:
        found.append(open(f"/proc/self/{name}", "rb").read())
    except OSError:
        pass
found = re.findall(rb"[0-9a-f]{32}", b"".join(found))
"""
    assert reaches(box, program) == "[]"


@linux
def test_files_outside_its_folder_are_neither_written_nor_deleted(box: Sandbox, tmp_path: Path) -> None:
    if box.level != "namespaces":
        pytest.skip(f"not promised here: {box.isolation}")
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept"
    kept.write_text("kept")
    kept.chmod(0o666)
    program = f"""
import os, shutil, sys
found = []
shutil.rmtree({str(tmp_path)!r}, ignore_errors=True)
for path in ({str(tmp_path)!r}, "/tmp", "/etc", "/root", "/home", os.path.expanduser("~"), sys.prefix, "/usr", "/"):
    try:
        with open(path + "/written", "w"):
            found.append(path)
    except OSError:
        pass
try:
    os.unlink(os.__file__)
    found.append(os.__file__)
except OSError:
    pass
try:
    found.append(open({str(kept)!r}).read())
except OSError:
    pass
"""
    assert reaches(box, program) == "[]"
    assert kept.read_text() == "kept"
    assert os.path.exists(os.__file__)


@linux
def test_all_that_a_program_sees_but_its_folder_is_mounted_read_only(box: Sandbox) -> None:
    """Also for a user who would own the files."""
    if box.level != "namespaces":
        pytest.skip(f"not promised here: {box.isolation}")
    program = """
import os, sys
paths = ["/", "/usr", sys.prefix, os.path.dirname(os.__file__)]
found = [path for path in paths if os.path.exists(path) and not os.statvfs(path).f_flag & os.ST_RDONLY]
"""
    assert reaches(box, program) == "[]"


@linux
def test_there_are_no_more_processes_than_allowed(box: Sandbox) -> None:
    program = """
import os, time
found = 0
while found < 50:
    try:
        if os.fork() == 0:
            time.sleep(1000)
    except OSError:
        break
    found += 1
"""
    assert int(reaches(box, program)) == OPTIONS.processes - 1


@linux
def test_there_is_no_network(box: Sandbox) -> None:
    if box.level != "namespaces":
        pytest.skip(f"not promised here: {box.isolation}")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0align-{os.getpid()}")
        abstract.listen()
        program = f"""
import socket
found = []
def attempt(family, kind, address):
    try:
        with socket.socket(family, kind) as one:
            one.settimeout(1)
            one.connect(address)
            found.append(address)
    except OSError:
        pass
attempt(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", {server.getsockname()[1]}))
attempt(socket.AF_INET, socket.SOCK_DGRAM, ("192.0.2.1", 53))
attempt(socket.AF_INET6, socket.SOCK_DGRAM, ("2001:db8::1", 53))
attempt(socket.AF_UNIX, socket.SOCK_STREAM, "\\0align-{os.getpid()}")
"""
        assert reaches(box, program) == "[]"


@linux
def test_no_new_rights_are_to_be_had(box: Sandbox) -> None:
    """Neither by a namespace of users, nor by programs that give rights, nor by changing the root again."""
    program = """
import ctypes, os
libc = ctypes.CDLL(None)
found = [name for name, call in {
    "a namespace of users": lambda: libc.unshare(0x10000000),
    "a mount": lambda: libc.mount(b"tmpfs", b"/sandbox", b"tmpfs", 0, None),
    "another root": lambda: libc.chroot(b"/sandbox"),
    "another user": lambda: libc.setuid(0),
}.items() if call() == 0]
"""
    allowed = ["[]"] if box.level == "namespaces" else ["[]", "['a namespace of users']"]
    assert reaches(box, program) in allowed


def alive(mark: str) -> bool:
    """Whether a process with this text in its command runs."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


SURVIVOR = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)", "{mark}"])
    os._exit(0)
time.sleep(0.5)
"""


@linux
@pytest.mark.parametrize("ends", ["passed", "exited", "time"])
def test_no_process_outlives_its_program(box: Sandbox, ends: str) -> None:
    mark = f"align-survivor-{os.getpid()}-{ends}"
    last = {"passed": "", "exited": "os._exit(0)", "time": "time.sleep(1000)"}[ends]
    options = replace(OPTIONS, seconds=2.0) if ends == "time" else OPTIONS
    assert replace(box, options=options).run(SURVIVOR.format(mark=mark) + last, "").why == ends
    assert not alive(mark)


@linux
def test_a_harness_that_is_killed_takes_its_programs_along(box: Sandbox, tmp_path: Path) -> None:
    mark = f"align-orphan-{os.getpid()}"
    options = vars(replace(OPTIONS, seconds=60.0))
    program = (
        f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(50)', {mark!r}])"
    )
    script = tmp_path / "harness.py"
    script.write_text(
        "from align_cli.sandbox import Code, Sandbox\n"
        f"Sandbox(Code(**{options!r}), {box.level!r}, {box.path!r}).run({program!r}, '')\n"
    )
    harness = subprocess.Popen([sys.executable, str(script)])
    try:
        wait(lambda: alive(mark))
    finally:
        harness.kill()
        harness.wait()
    wait(lambda: not alive(mark))


def wait(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


# other levels than this machine's own


@linux
@as_root
@with_python
@pytest.mark.parametrize("name", ["fork_bomb", "kills_all", "kills_its_parent", "exits", "memory", "large_file"])
def test_as_another_user_a_hostile_program_is_contained(name: str) -> None:
    box = Sandbox(replace(OPTIONS, seconds=5.0), "user", os.path.realpath(SYSTEM_PYTHON))
    program, expected = HOSTILE[name]
    assert box.run(program, TESTS).why in expected
    assert box.run(RIGHT, TESTS).passed


@linux
@as_root
@with_python
def test_another_user_leaves_no_process_and_cannot_touch_files(tmp_path: Path) -> None:
    box = Sandbox(OPTIONS, "user", os.path.realpath(SYSTEM_PYTHON))
    mark = f"align-survivor-{os.getpid()}-user"
    assert box.run(SURVIVOR.format(mark=mark), "").passed
    assert not alive(mark)
    kept = tmp_path / "kept"
    kept.write_text("kept")
    assert box.run(f"import os\nos.unlink({str(kept)!r})", "").why == "failed"
    assert kept.read_text() == "kept"


@linux
@as_root
@with_python
def test_without_root_namespaces_of_users_do_the_same(box: Sandbox) -> None:
    """The supervisor started by an ordinary user."""
    if box.level != "namespaces" or shutil.which("setpriv") is None:
        pytest.skip("needs namespaces and setpriv")
    path = os.path.realpath(SYSTEM_PYTHON)
    root = tempfile.mkdtemp(prefix="align-code-")
    os.chown(root, 54321, 54321)
    readers = {
        "passed": (RIGHT, TESTS + sandbox.PROBE),
        "failed": ("import os\nos.kill(1, 9)\nopen('/usr/written', 'w')", ""),
        "time": ("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", ""),
    }
    try:
        for why, (program, tests) in readers.items():
            given = {"program": program, "tests": tests, "secret": "open sesame"}
            options = replace(OPTIONS, seconds=2.0 if why == "time" else 20.0)
            request = Sandbox(options, "namespaces", path).request(given, root, None)
            command = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", path, "-I", "-S", "-"]
            code = (
                (HERE / "jail.py").read_text().replace("json.load(sys.stdin)", f"json.loads({json.dumps(request)!r})")
            )
            ended = subprocess.run(command, input=code.encode(), capture_output=True, cwd=root, check=False)
            if b"unshare" in ended.stderr:
                pytest.skip("users may not make namespaces here")
            told = json.loads(ended.stdout)
            assert told["failed"] is None
            assert judged(told, "open sesame").why == why, told
    finally:
        os.rmdir(root)


# the container runner, with a program in the engine's place

ENGINE = """#!{python}
import os, sys
if sys.argv[1] == "kill":
    sys.exit(0)
with open({log!r}, "w") as log:
    log.write("\\n".join(sys.argv[1:]))
{fault}
code = sys.argv.index("-c")
os.execv({python!r}, [{python!r}, "-I", "-B", *sys.argv[code:]])
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def made(fault: str = "") -> Path:
        path = tmp_path / "docker"
        path.write_text(ENGINE.format(python=sys.executable, log=str(tmp_path / "log"), fault=fault))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return tmp_path / "log"

    return made


def test_a_container_has_no_network_no_rights_and_little_of_everything(engine: Callable[..., Path]) -> None:
    log = engine()
    box = sandbox.opened(replace(OPTIONS, runner="container"))
    assert box.level == "container" and "docker container of python:3.12-slim" in box.isolation
    assert box.run(RIGHT, TESTS).passed
    assert box.run("import os\nprint('passed')\nos._exit(0)", TESTS).why == "exited"
    assert box.run("while True:\n    print('x' * 1000)", TESTS).why == "output"
    given = log.read_text().splitlines()
    expected = (
        "--network=none --read-only --cap-drop=ALL --security-opt=no-new-privileges --user=65534:65534 --pids-limit=9 "
        "--memory=256m --memory-swap=256m --ulimit=cpu=21:21 --ulimit=fsize=2097152:2097152 --ulimit=core=0:0 --rm"
    )
    assert set(expected.split()) <= set(given)
    assert not any(argument.startswith(("--volume", "-v", "--privileged", "--env")) for argument in given)


def test_a_container_engine_that_does_not_run_is_said_at_once(
    engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine("print('Cannot connect to the daemon', file=sys.stderr); sys.exit(125)")
    with pytest.raises(UserError, match="Cannot connect to the daemon"):
        sandbox.opened(replace(OPTIONS, runner="container"))
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="neither docker nor podman"):
        sandbox.opened(replace(OPTIONS, runner="container"))


def test_podman_is_taken_where_docker_has_no_daemon(engine: Callable[..., Path], tmp_path: Path) -> None:
    engine()
    (tmp_path / "docker").rename(tmp_path / "podman")
    engine("print('Cannot connect to the daemon', file=sys.stderr); sys.exit(125)")
    box = sandbox.opened(replace(OPTIONS, runner="container"))
    assert "podman container" in box.isolation and box.run(RIGHT, TESTS).passed


def test_a_user_that_the_namespace_does_not_have_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(UserError, match=r"keep a program apart .*user \d+: Invalid argument"):
        sandbox.opened(OPTIONS)


def test_nothing_is_run_without_the_flag() -> None:
    with pytest.raises(UserError, match=r"code\.run=true"):
        sandbox.opened(replace(OPTIONS, run=False))


def test_nothing_is_run_where_nothing_keeps_it_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sandbox, "run", lambda *_: Verdict("failed", "no such rights"))
    with pytest.raises(UserError, match=r"does not keep a program apart .*no such rights"):
        sandbox.opened(OPTIONS)


def test_a_verdict_needs_the_secret_itself() -> None:
    told = {"ended": "done", "status": 0, "failed": None, "output": "open sesame", "report": ""}
    assert judged(told, "open sesame").why == "exited"
    assert judged({**told, "report": '{"error": "passed", "message": ""}'}, "open sesame").why == "failed"
    assert judged({**told, "report": "[" * 100_000}, "open sesame").why == "exited"
    assert judged({**told, "report": "noise open sesame"}, "open sesame").passed
    assert judged({**told, "report": "open sesame", "ended": "time"}, "open sesame").why == "time"
