"""The package is built in floors: what is below imports nothing from above."""

import ast
from pathlib import Path

import pytest

import align_cli

PACKAGE = Path(align_cli.__file__).parent
FLOORS = (
    (
        "losses",
        "divergences",
        "surrogates",
        "optima",
        "advantages",
        "targets",
        "logprobs",
        "metrics",
        "moments",
        "preferences",
        "ranges",
        "errors",
    ),
    ("answers", "columns", "config", "files", "paths", "process", "secrets", "terminal"),
    ("data",),
    ("models",),
    (
        "distributed",
        "engine",
        "checkpoints",
        "cache",
        "references",
        "rewards",
        "scorers",
        "journal",
        "judges",
        "length_control",
        "verdicts",
        "raters",
        "reinforcement",
        "baselines",
        "normaliser",
        "proposal",
        "rollouts",
        "tilt",
        "sources",
        "generation",
        "memory",
        "precision",
        "diversity",
        "statistics",
        "rundir",
        "sandbox",
        "responses",
    ),
    (
        "refusals",
        "sections",
        "experiment",
        "resources",
        "reading",
        "method",
        "train",
        "evaluate",
        "evals",
        "results",
        "sample",
        "chat",
        "subject",
        "tracking",
        "world",
        "assembly",
        "summaries",
        "study",
        "studies",
        "run",
        "comparison",
        "report",
        "verify",
        "exits",
    ),
    ("launch", "worker", "sweep", "reproduction", "cli", "commands"),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def part(module: str) -> str:
    """The module or folder of the package that a dotted name lies in."""
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    """The dotted names under `align_cli` that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("align_cli.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "align_cli":
            found |= {f"align_cli.{alias.name}" for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("align_cli."):
            found.add(str(node.module))
    return found


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def own_part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_floor() -> None:
    assert {own_part(path) for path in sources()} - {"conf", "recipes"} == set(FLOOR)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    own = own_part(path)
    for module in imports(path):
        assert FLOOR[part(module)] <= FLOOR[own], f"{path.name} imports {module} from above"


def test_no_relative_import_escapes_the_check() -> None:
    for path in sources():
        relative = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, path


def test_the_mathematics_needs_torch_alone() -> None:
    allowed = {"torch", "math", "dataclasses", "collections", "typing", "annotated_types", "align_cli"}
    for path in sources():
        if FLOOR[own_part(path)] > 0:
            continue
        roots: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots.add(str(node.module).partition(".")[0])
        assert roots <= allowed, path


@pytest.mark.parametrize("height", range(len(FLOORS)))
def test_no_two_modules_import_each_other(height: int) -> None:
    """Within a floor, imports form no circle, wherever they stand in a file."""
    edges = {
        own: {part(m) for path in sources() if own_part(path) == own for m in imports(path)} - {own}
        for own in FLOORS[height]
    }

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        for target in edges.get(start, set()):
            if target == goal or (target not in seen and reaches(target, goal, seen | {target})):
                return True
        return False

    assert not [own for own in edges if reaches(own, own, set())]
