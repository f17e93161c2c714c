"""What is asked of a file system: that a name lasts, and that one process holds a file alone."""

import errno
import fcntl
import os
from pathlib import Path

LOCKLESS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre mounted without flock, NFS without its daemon


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename is only safe from a power cut once its folder is synchronised."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locked(file: int, how: int) -> bool:
    """Take the lock of an open file, or go on without one where its file system has none.

    Args:
        file: a descriptor; the kernel releases the lock when the last process that holds it has ended.
        how: as `fcntl.flock` takes it.

    Returns:
        Whether there are locks.

    Raises:
        BlockingIOError: another process holds it, and `how` is not to wait.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in LOCKLESS:
            raise
        return False
    return True
