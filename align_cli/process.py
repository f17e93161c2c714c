"""What a process settles before torch is imported: how its threads wait, and in what pieces its memory comes."""

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
