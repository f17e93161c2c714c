"""Break each loss, one change of its source at a time, and see its proofs fail.

A mutant is the module made from the changed text. `test_<name>.py` lists the changes, and those of its proofs that need
nothing but the module run on it; it is killed when one of them fails. A change whose text is no longer in the source,
or is there twice, fails.
"""

import inspect
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

import pytest

LOSSES = sorted(module.name for module in iter_modules(import_module("align_cli.losses").__path__))

Proof = Callable[[ModuleType], None]


def proofs(name: str) -> list[Proof]:
    """The proofs about one loss that need nothing but its module."""
    tests = inspect.getmembers(import_module(f"test_{name}"), inspect.isfunction)
    return [
        test
        for title, test in tests
        if title.startswith("test_") and list(inspect.signature(test).parameters) == ["loss"]
    ]


def mutate(name: str, old: str, new: str) -> ModuleType:
    """The module of one loss, made from its source with `old` replaced by `new`."""
    original = import_module(f"align_cli.losses.{name}")
    source = inspect.getsource(original)
    assert source.count(old) == 1, f"'{old}' is in {name}.py {source.count(old)} times"
    mutant = ModuleType(f"mutant_of_{name}")
    exec(compile(source.replace(old, new), f"<{name}: {old} -> {new}>", "exec"), vars(mutant))
    return mutant


def is_killed(mutant: ModuleType, by: list[Proof]) -> bool:
    """Whether one of the proofs fails on it, by its assertion or because the broken code does not run."""
    for proof in by:
        try:
            proof(mutant)
        except (AssertionError, RuntimeError, TypeError, ValueError):
            return True
    return False


@pytest.mark.parametrize("name", LOSSES)
def test_no_mutant_survives(name: str) -> None:
    oracles, changes = proofs(name), import_module(f"test_{name}").MUTANTS
    assert len(changes) > 1
    assert not [change for change in changes if not is_killed(mutate(name, *change), oracles)]


@pytest.mark.parametrize("name", LOSSES)
def test_the_unbroken_loss_passes_its_proofs(name: str) -> None:
    assert not is_killed(mutate(name, f"def {name}(", f"def {name}("), proofs(name))
