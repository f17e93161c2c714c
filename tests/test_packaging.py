"""What is installed works like the checkout, from any directory; the scripts set up once and then do nothing."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from align_cli import paths

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that succeeds, without this process's PYTHONPATH."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHON")}
    ended = subprocess.run(
        list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def build(source: Path, target: str, into: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", target, "-d", into, cwd=source)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    archive = build(ROOT, "sdist", folder)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; what it depends on is borrowed from this one."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    site = venv / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    pip = (sys.executable, "-m", "pip", "--python", venv, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=venv)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return venv


def shipped(folder: str) -> set[str]:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder, cwd=ROOT)
    return {name for name in listed.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of files to compare with")
    return shipped("conf") | shipped("recipes")


def test_a_wheel_says_that_it_is_typed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        assert "align_cli/py.typed" in file.namelist()
    assert "Typing :: Typed" in PROJECT["classifiers"]


def test_a_wheel_carries_the_configuration_and_the_recipes(wheel: Path, tracked: set[str]) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = HeaderParser().parsestr(
            file.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        )
        scripts = file.read(next(name for name in names if name.endswith("/entry_points.txt"))).decode()
    assert {f"align_cli/{name}" for name in tracked} <= names
    assert not [name for name in names if name.startswith("tests") or "__pycache__" in name]
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.14"}
    assert "align = align_cli.cli:main" in scripts


def test_a_wheel_from_the_sdist_is_the_wheel_from_the_checkout(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(build(sdist, "wheel", tmp_path)) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        for name in one.namelist():
            assert one.read(name) == other.read(name), name


def test_an_sdist_has_what_its_tests_and_scripts_need(sdist: Path) -> None:
    for name in (
        "scripts/test",
        "scripts/environment",
        "tests/test_packaging.py",
        "constraints.txt",
        "conf/algo/nca.yaml",
    ):
        assert (sdist / name).is_file(), name
    assert os.access(sdist / "scripts/test", os.X_OK)


PROBE = """
import sys
from align_cli import config, paths
from align_cli.commands import listing
assert paths.conf().is_relative_to(sys.prefix), paths.conf()
assert paths.recipes().is_relative_to(sys.prefix), paths.recipes()
assert listing.main(["show", "algo/nca"]) == 0
tree = config.compose("train", ["algo=exo", "algo.beta=0.5"])
print(tree["algo"]["name"], tree["algo"]["beta"])
"""


def test_the_installed_wheel_composes_from_another_directory(installed: Path, tmp_path: Path) -> None:
    said = run(installed / "bin/python", "-c", PROBE, cwd=tmp_path)
    assert said.splitlines()[-1] == "exo 0.5"
    assert (installed / "bin/align").is_file()


def test_the_checkout_uses_its_own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not (ROOT / "align_cli" / "conf").exists():
        assert (paths.conf(), paths.recipes()) == (ROOT / "conf", ROOT / "recipes")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    assert paths.cache() == tmp_path
    monkeypatch.delenv("ALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache().name == "align"


def requirements() -> list[str]:
    extras = PROJECT["optional-dependencies"]
    return [*PROJECT["dependencies"], *extras["test"], *extras["peers"]]


def test_every_dependency_is_pinned_and_none_to_a_build_for_one_machine() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", line) for line in lines), lines
    pinned = [line.partition("==")[0] for line in lines]
    assert len(pinned) == len(set(pinned))
    own = PROJECT["name"]  # an extra that takes in another one
    assert {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements()} <= {own, *pinned}
    assert "torch==2.13.0" in lines


def test_every_import_of_the_package_is_a_declared_dependency() -> None:
    names = {"yaml": "pyyaml", "hydra": "hydra-core", "google": "protobuf"}
    for_users = [extra for extra in PROJECT["optional-dependencies"] if extra not in ("peers", "test")]
    wanted = [*PROJECT["dependencies"], *(r for extra in for_users for r in PROJECT["optional-dependencies"][extra])]
    declared = {re.split(r"[\[<>=]", requirement)[0].replace("-", "_") for requirement in wanted}
    for path in (ROOT / "align_cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {module.partition(".")[0] for module in modules}:
                known = top in sys.stdlib_module_names or top == "align_cli"
                assert known or names.get(top, top).replace("-", "_") in declared, f"{path}: {top}"


STAND_IN = """#!/bin/sh
case "$*" in
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && cp "{align}" "$4/bin/align" ;;
    "-m pip "*) echo "$*" >>"{log}" ;;
    *) exec "{python}" "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the scripts alone, and an interpreter that notes what it would install."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    align = tmp_path / "align"
    python.write_text(STAND_IN.format(log=tmp_path / "pip.log", python=sys.executable, align=align))
    align.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m align_cli.cli "$@"\n')
    for program in (python, align):
        program.chmod(0o755)
    return tmp_path


def environment(checkout: Path, extras: str) -> list[str]:
    """What a script that asks for these extras installs."""
    log = checkout / "pip.log"
    log.write_text("")
    script = 'set -euo pipefail; source scripts/environment; environment "$1"'
    run("bash", "-c", script, "script", extras, cwd=checkout, PYTHON=str(checkout / "python"))
    return log.read_text().splitlines()


def test_the_scripts_install_once_and_again_only_after_a_change(checkout: Path) -> None:
    *torch, rest = environment(checkout, "test,peers")
    assert any(re.search(r" torch==2\.13\.0(\+cpu)?$", line) for line in torch)
    assert f"--editable {checkout}[test,peers] --constraint {checkout}/constraints.txt" in rest
    assert environment(checkout, "test,peers") == []
    assert environment(checkout, "") == []  # the core is there too
    with open(checkout / "constraints.txt", "a") as file:
        file.write("# changed\n")
    assert len(environment(checkout, "")) == 2
    assert len(environment(checkout, "test,peers")) == 2


def test_the_quickstart_installs_and_trains(checkout: Path) -> None:
    small = "world.demonstrations=40 world.sft_steps=2 world.hidden=32 world.layers=1 world.prompts=8 world.held_out=4"
    steps = "train.steps=1 train.prompts=2 eval.groups=2 eval.samples=2 eval.prompts=2 data.held_out=2 track=none"
    run("scripts/quickstart", *small.split(), *steps.split(), cwd=checkout, PYTHON=str(checkout / "python"))
    assert f"--editable {checkout} --constraint" in (checkout / "pip.log").read_text()
    (summary,) = (checkout / "runs").glob("*-nca-tiny-toy/summary.json")
    assert json.loads(summary.read_text())["steps"] == 1


def test_the_test_script_installs_and_runs_the_tests(checkout: Path) -> None:
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_one.py").write_text("def test_it_is_run():\n    pass\n")
    said = run("scripts/test", cwd=checkout, PYTHON=str(checkout / "python"))
    assert "1 passed" in said and "2 workers" in said
    assert f"--editable {checkout}[test,peers] --constraint" in (checkout / "pip.log").read_text()


def test_the_readme_installs_the_checkout(installed: Path) -> None:
    """Nothing is fetched or written; -e is left out, for which the builder asks for one more package."""
    pip = (sys.executable, "-m", "pip", "--python", installed, "--disable-pip-version-check")
    more = ("--dry-run", "--no-deps", "--no-index", "--no-build-isolation")
    lines = re.findall(r"^ {4}pip (.+?)(?: {3,}.*)?$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        words = [word for word in shlex.split(line) if word != "-e"]
        assert "Would install align-cli-" in run(*pip, *words, *more, cwd=ROOT), line
        for extras in re.findall(r"\[(.*)\]", line):
            assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_the_scripts_refuse_a_python_that_is_too_old(checkout: Path) -> None:
    old = checkout / "python"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.9.1; else exit 1; fi\n')
    ended = subprocess.run(
        ["bash", checkout / "scripts/test"],
        env=os.environ | {"PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [f"error: PYTHON={old} is Python 3.9.1; align needs Python 3.11, 3.12 or 3.13"]
