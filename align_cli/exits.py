"""Exit codes, and how an error becomes one."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from align_cli import terminal
from align_cli.errors import RunError, Stopped, UserError

# A disk that is full or broken, a file that may not be read or written, too many open ones: a traceback would say no
# more.
OF_THE_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EMFILE, errno.ENFILE),
)

DONE = 0
FAILED = 1
USER = 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped by a signal, run the same command again to go on


def guarded(command: Callable[[], int]) -> int:
    """Run a command; what went wrong is one line, and only what nobody expected keeps its traceback.

    Returns:
        What the command returns, or the code of the error.
    """
    try:
        return command()
    except UserError as mistake:
        for line in str(mistake).splitlines():
            terminal.error(line)
        return USER
    except RunError as failure:
        terminal.error(str(failure))
        return FAILED
    except Stopped as stopped:
        terminal.say(f"{stopped}; {stopped.command} goes on from there")
        return STOPPED
    except KeyboardInterrupt:
        terminal.say("interrupted")
        return STOPPED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has to go somewhere
        return DONE
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        terminal.error(f"{error.filename or 'a file'}: {error.strerror}")
        return FAILED


def stopping() -> list[signal.Signals]:
    """The signals that ask to save and to end; among them SIGHUP, of a terminal that is closed, but not under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within the block any signal to stop interrupts as Ctrl-C does, so that `guarded` ends with `STOPPED`."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in stopping() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
