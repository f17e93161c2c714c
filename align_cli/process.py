"""What a process settles before torch is imported: how its threads wait, and how it holds its memory."""

import ctypes
import os


def settle() -> None:
    """Set what is read when torch is imported, as far as the user has not."""
    # Threads that wait by spinning for long make a step five to twenty times slower as soon as anything else runs on
    # the machine; threads that sleep at once make it a quarter slower where nothing does. These spin for some
    # microseconds, about as long as the gap between two operations.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Every step allocates gigabytes again; in pages of two megabytes, where Linux has them, they come in far fewer
    # pieces. glibc's own settings (one arena, no return of memory) add nothing to that which could be measured, and
    # make a tokenizer's threads three times slower.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # oneDNN keeps a third of a megabyte for every shape of product that it has met, and rows of any length have many.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def trim() -> None:
    """Give memory that was freed back to the system, where the C library can.

    Blocks of a larger size do not fit into the gaps that smaller ones have left, so a process that meets ever larger
    micro-batches would hold the gaps of all of them.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc's
        library.malloc_trim(0)
