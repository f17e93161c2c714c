"""Keeps a program of unknown intent apart: `python -I -S jail.py`, of the standard library alone, on Linux.

It reads a request (JSON) on stdin and writes what became of it on stdout. Between the harness and the program stand
this process, the supervisor, and a keeper, the first process of the program's own process namespace:

    supervisor   reads what is said, up to a limit, until the time is up, and then kills everything
      keeper     makes the program's world: a file system of its own, no network, no rights; its end is everyone's end
        program  runs `inside.py` under resource limits, with an empty environment

At the level `namespaces` the program sees only the interpreter's files, read-only, and an empty folder in memory. At
the level `user`, for root where the system forbids namespaces, it is an unprivileged user that owns no file.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import selectors
import signal
import stat
import struct
import sys
import time
import traceback
from typing import Any

Request = dict[str, Any]

# of linux/sched.h, linux/mount.h, linux/prctl.h and the system call table, where it is the same for all machines
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
SYS_MOUNT_SETATTR = 442
PDEATHSIG, DUMPABLE, SUBREAPER, NO_NEW_PRIVS = 1, 4, 36, 38

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random")
HOME = "/sandbox"
FILES = 64  # open at a time
CHUNK = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = (None if text is None else text.encode() for text in (source, target, kind))
    _checked(_libc.mount(*texts, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def _restrict(target: str, attributes: int, flags: int = 0) -> None:
    """Take rights from a mount, and with AT_RECURSIVE from all below it."""
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    result = _libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, target.encode(), flags, wanted, ctypes.c_size_t(len(wanted)))
    _checked(result, f"mount_setattr {target}")


def main() -> None:
    request = json.load(sys.stdin)
    json.dump(supervise(request), sys.stdout)


def supervise(request: Request) -> Request:
    """Run the program of a request and kill all that is left of it.

    Returns:
        `report` and `output`, what was said where; `ended`: done, time or output; `status`: how the program's process
        ended (as of os.waitpid), None where it had to be killed; `failed`: why it could not be started, or None.
    """
    _prctl(SUBREAPER, 1)  # what outlives its parent becomes a child of this process
    if request["level"] == "namespaces":
        _unshare()
    _prctl(PDEATHSIG, signal.SIGKILL)
    given = os.memfd_create("request")
    os.write(given, json.dumps({key: request[key] for key in ("program", "tests", "secret")}).encode())
    os.lseek(given, 0, os.SEEK_SET)
    report, output, status, failed = (os.pipe() for _ in range(4))
    keeper = os.fork()
    if keeper == 0:
        _keep(request, (given, report[1], output[1]), status[1], failed[1])
    for _, end in (report, output, status, failed):
        os.close(end)
    streams = {"report": report[0], "output": output[0], "status": status[0]}
    told, ended = listen(streams, until="status", seconds=request["seconds"], most=request["output_bytes"])
    _kill(keeper, None if request["level"] == "namespaces" else request["uid"])
    why = os.read(failed[0], CHUNK).decode(errors="replace")
    whole = len(told["status"]) == 4
    return {
        "report": told["report"].decode(errors="replace"),
        "output": told["output"].decode(errors="replace"),
        "ended": ended,
        "status": struct.unpack("i", told["status"])[0] if whole else None,
        "failed": why or None,
    }


def listen(streams: dict[str, int], *, until: str, seconds: float, most: int) -> tuple[dict[str, bytes], str]:
    """What comes from each stream until one of them ends, the time is up, or one says more than `most` bytes.

    Returns:
        at most `most` bytes of each, and which it was: done, time or output.
    """
    told = {name: bytearray() for name in streams}
    ends = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for name, stream in streams.items():
            os.set_blocking(stream, False)
            selector.register(stream, selectors.EVENT_READ, name)
        ended = None
        while ended is None:
            ready = selector.select(max(0.0, ends - time.monotonic()))
            for key, _ in ready:
                if not _take(key.fd, told[key.data]):
                    selector.unregister(key.fd)
                    if key.data == until:
                        ended = "done"
            if any(len(text) > most for text in told.values()):
                ended = "output"
            elif ended is None and time.monotonic() >= ends:
                ended = "time"
    for name, stream in streams.items():
        while len(told[name]) <= most and _take(stream, told[name]):
            pass
    return {name: bytes(text[:most]) for name, text in told.items()}, ended


def _take(stream: int, text: bytearray) -> bool:
    """Add what a stream has to a text; whether it had something, or may have later."""
    try:
        found = os.read(stream, CHUNK)
    except BlockingIOError:
        return False
    text += found
    return bool(found)


def _kill(keeper: int, uid: int | None) -> None:
    """Kill the keeper, with it its namespace; where there is none, whatever else belongs to the user."""
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    if uid is None:
        return
    killer = os.fork()
    if killer == 0:
        _become(uid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # everything that this user may kill, but this process
        os._exit(0)
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _unshare() -> None:
    """Leave the system's namespaces. Root needs no user namespace, and with one it would stay the files' owner."""
    user, group = os.getuid(), os.getgid()
    flags = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    _checked(_libc.unshare(flags if user == 0 else flags | NEWUSER), "unshare")
    if user == 0:
        return
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def _keep(request: Request, given: tuple[int, int, int], status: int, failed: int) -> None:
    """The keeper's life."""
    try:
        if request["level"] == "namespaces":
            _furnish(request)
        else:
            os.chdir(request["folder"])
        if request["uid"] is not None:
            _become(request["uid"])
        _prctl(NO_NEW_PRIVS, 1)
        _prctl(DUMPABLE, 0)  # the program cannot look into this process, nor take its files
        _prctl(PDEATHSIG, signal.SIGKILL)
        program = os.fork()
        if program == 0:
            _begin(request, given)
        for stream in given:
            os.close(stream)
        while True:
            ended, how = os.wait()
            if ended == program:
                os.write(status, struct.pack("i", how))
                os._exit(0)
    except BaseException:
        # said in whichever of the two processes it happened
        os.write(failed, traceback.format_exc().splitlines()[-1].encode())
        os._exit(1)


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _furnish(request: Request) -> None:
    """A root of its own: what the interpreter reads, read-only, a few devices, and one writable folder in memory."""
    root, uid = request["folder"], request["uid"]
    user, group = (os.getuid(), os.getgid()) if uid is None else (uid, uid)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in request["readable"]:
        inside = root + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
        elif os.path.exists(path):
            _bind(path, inside)
            _restrict(inside, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, AT_RECURSIVE)
    os.mkdir(f"{root}/dev")
    for path in filter(os.path.exists, DEVICES):
        _bind(path, root + path)
    os.mkdir(root + HOME)
    size = f"size={request['file_mb']}m,nr_inodes=4096,mode=700,uid={user},gid={group}"
    _mount("tmpfs", root + HOME, "tmpfs", MS_NOSUID | MS_NODEV, size)
    _restrict(root, ATTR_RDONLY)
    os.chroot(root)  # and in a changed root no process may make a namespace of users, in which it would have rights
    os.chdir(HOME)


def _bind(path: str, inside: str) -> None:
    if stat.S_ISDIR(os.stat(path).st_mode):
        os.mkdir(inside)
    else:
        os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
    _mount(path, inside, None, MS_BIND | MS_REC)


def _begin(request: Request, given: tuple[int, int, int]) -> None:
    """Become the program."""
    os.setsid()
    os.umask(0o077)
    seconds, megabyte = math.ceil(request["seconds"]) + 1, 1 << 20
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: request["memory_mb"] * megabyte,
        resource.RLIMIT_FSIZE: request["file_mb"] * megabyte,
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_NPROC: request["processes"] + 1,  # the keeper counts
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        hardest = resource.getrlimit(limit)[1]
        value = value if hardest == resource.RLIM_INFINITY else min(value, hardest)
        resource.setrlimit(limit, (value, value))
    for wanted, stream in enumerate(given):
        os.dup2(stream, wanted)
    os.execve(request["python"], [request["python"], "-I", "-B", "-c", request["inside"]], {})


if __name__ == "__main__":
    main()
