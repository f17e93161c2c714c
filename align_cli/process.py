"""A process: its cores, and what it settles before torch is imported: how threads wait, and how memory is held."""

import ctypes
import os


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle() -> None:
    """Set what is read when torch is imported, as far as the user has not."""
    # Threads that wait by spinning for long make a step five to twenty times slower as soon as anything else runs on
    # the machine; threads that sleep at once make it a quarter slower where nothing does. These spin for some
    # microseconds, about as long as the gap between two operations.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Every step allocates gigabytes again. In pages of two megabytes, where Linux has them, they come in far fewer
    # pieces; and what is freed is kept for the next step, where glibc would give large blocks back at once.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        _keep_freed_memory()
    # oneDNN keeps a third of a megabyte for every shape of product that it has met, and rows of any length have many.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # Rows of any length leave gaps in a GPU's memory that no later row fits into, unless blocks can grow.
    if not any(f"PYTORCH_{name}ALLOC_CONF" in os.environ for name in ("", "CUDA_", "HIP_")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _keep_freed_memory() -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc's; the numbers are those of its malloc.h
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own, which would end with it
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink by itself


def trim() -> None:
    """Give memory that was freed back to the system, where the C library can.

    Blocks of a larger size do not fit into the gaps that smaller ones have left, so a process that meets ever larger
    micro-batches would hold the gaps of all of them.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc's
        library.malloc_trim(0)
