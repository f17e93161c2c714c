"""The loss under test.

Every proof in `test_<name>.py` takes the module `loss` and nothing else by name, so that `test_mutants.py` can hand it
a broken copy of the module and see the proof fail.
"""

from importlib import import_module
from types import ModuleType

import pytest


@pytest.fixture
def loss(request: pytest.FixtureRequest) -> ModuleType:
    """`align_cli.losses.nca` for the proofs of `test_nca.py`."""
    return import_module(f"align_cli.losses.{request.path.stem.removeprefix('test_')}")
