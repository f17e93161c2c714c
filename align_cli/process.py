"""What a process must settle before torch is imported: how its threads wait and how its memory comes and goes."""

import ctypes
import os
import sys

# glibc's names for what `mallopt` sets.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_MOST = 2**31 - 1


def settle() -> None:
    """Set what the user has not set; does nothing where the system has no such thing."""
    # Threads that wait by spinning for long make a step five to twenty times slower as soon as anything else runs on
    # the machine; threads that sleep at once make it a quarter slower where nothing does. These spin for some
    # microseconds, about as long as the gap between two operations. OpenMP reads it when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if sys.platform != "linux":
        return
    # Every step allocates the same gigabytes again. Memory that goes back to the system in between comes again page
    # by page, which takes up to half of a step on a CPU; it stays with the process, in one arena for all threads.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has another allocator
        return
    for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _MOST), (_TOP_PAD, 1 << 26)):
        library.mallopt(option, value)
