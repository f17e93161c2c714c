"""The command `align`: help, version, completion, and how an error becomes an exit code."""

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align_cli import __version__, cli, exits, paths, terminal
from align_cli.commands import completion
from align_cli.errors import Stopped, UserError

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "wandb", "hydra", "pydantic", "matplotlib", "numpy")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["-sc", "query=bash"], ["ls"]])
def test_answers_that_need_nothing_heavy_import_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from align_cli import cli\n"
        f"assert cli.dispatch({arguments}) == 0\n"
        f"print(sorted({set(HEAVY)} & set(sys.modules)), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr.splitlines()[-1] == "[]"
    assert ended.stdout


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"], ["train", "-h"], ["plan", "--help"]])
def test_help_lists_every_command_and_exit_code(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(arguments) == 0
    told = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert f"\n  align {name} " in told, name
    for code in (exits.DONE, exits.FAILED, exits.USER, exits.STOPPED):
        assert f"{code} " in told
    for flag in ("-m", "--multirun", "--config-dir", "--plugin", "--cfg", "--version"):
        assert flag in told
    assert 'eval "$(align -sc install=bash)"' in told


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_says_how_it_is_used(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-h", "--help"):
        try:
            code = cli.dispatch([name, flag])
        except SystemExit as ended:  # argparse prints and leaves
            code = ended.code
        assert code == 0
        assert f"align {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, primary",
    [
        (["train"], "train"),
        (["plan"], "train"),
        (["evaluate"], "evaluate"),
        (["evaluate", "calibrate"], "calibrate"),
        (["sample"], "sample"),
        (["chat"], "chat"),
    ],
)
def test_help_explains_the_keys_of_a_configuration(
    command: list[str], primary: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.dispatch([*command, "--help"]) == 0
    assert (paths.conf() / f"{primary}.yaml").read_text() in capsys.readouterr().out


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["--version"]) == 0
    assert capsys.readouterr().out == f"align {__version__}\n"


def test_every_command_has_a_module() -> None:
    for module in set(cli.COMMANDS.values()):
        assert callable(importlib.import_module(f"align_cli.commands.{module}").main)


def test_errors_become_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        def command() -> int:
            raise error

        return exits.guarded(command)

    assert raising(UserError("one\ntwo")) == exits.USER
    assert capsys.readouterr().err.splitlines() == ["error: one", "error: two"]
    assert raising(Stopped("saved step 3")) == exits.STOPPED
    assert raising(KeyboardInterrupt()) == exits.STOPPED
    with pytest.raises(RuntimeError, match="unexpected"):
        raising(RuntimeError("unexpected"))


def test_cfg_prints_the_composed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train"], ["plan"], ["data", "show"]):
        assert cli.dispatch([*command, "--cfg", "algo=exo", "train.lr=0.25"]) == 0
        told = capsys.readouterr().out
        assert "  name: exo\n" in told and "  lr: 0.25\n" in told


@pytest.mark.parametrize(
    "line, answers",
    [
        ("align ", set(cli.COMMANDS)),
        ("align tr", {"train"}),
        ("align train al", {"algo=", "algo_setting="}),
        ("align train algo=nc", {"algo=nca"}),
        ("align train -m algo=dpo,nc", {"algo=dpo,nca"}),
        ("align train train.l", {"train.lr="}),
        ("align plan engine=zero", {f"engine=zero{stage}" for stage in range(4)}),
        ("align data show data=ultrai", {"data=ultrainteract"}),
        ("align show algo/nc", {"algo/nca"}),
        ("align show recipes/nca/figure5", {"recipes/nca/figure5"}),
        ("align reproduce nca/figure5", {"nca/figure5"}),
        ("align reproduce nca/figure5 sc", {"scale="}),
        ("align reproduce nca/figure5 scale=t", {"scale=tiny"}),
        ("align reproduce nca/figure5 sh", {"shrink="}),
        ("align reproduce nca/figure5 --", {"--plan", "--json", "--list", "--plugin", "--config-dir"}),
        ("align verify nc", {"nca"}),
        ("align verify nca --j", {"--json"}),
        ("align study con", {"contrast_variance"}),
        ("align study contrast_variance s", {"seed="}),
        ("align ls rec", {"recipes"}),
        ("align score algo=nc", {"algo=nca"}),
        ("align sample RUN prompts.jsonl out.jsonl s", {"samples=", "seed=", "system=", "scorer="}),
        ("align sample RUN prompts.jsonl out.jsonl scorer=mat", {"scorer=matches"}),
        ("align chat RUN --", {"--against"}),
        ("align chat RUN te", {"temperature="}),
        ("align cache ", {"ls", "verify", "gc"}),
        ("align cache v", {"verify"}),
        ("align cache ls ", set()),
        ("align doctor ", set()),
    ],
)
def test_completion_knows_commands_groups_and_keys(line: str, answers: set[str]) -> None:
    assert set(completion.complete(line)) == answers


def test_a_folder_that_is_exported_is_completed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert completion.complete(f"align export {tmp_path}/r") == [str(tmp_path / "run")]


def test_completion_can_be_installed(tmp_path: Path) -> None:
    align = tmp_path / "align"
    align.write_text(f'#!/bin/sh\nexec {sys.executable} -m align_cli.cli "$@"\n')
    align.chmod(0o755)
    script = """
        eval "$(align -sc install=bash)"
        COMP_LINE="align train algo=nc"; COMP_POINT=${#COMP_LINE}
        _align_completion; complete -p align; printf '%s\n' "${COMPREPLY[@]}"
    """
    path = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", "-c", script], env=path, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines() == ["complete -F _align_completion align", "algo=nca"], ended.stderr


def test_work_goes_on_where_nobody_reads_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        terminal.say("one")
        terminal.warn("two")


def test_what_the_machine_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(number: int) -> int:
        raise OSError(number, os.strerror(number), "some/file")

    assert exits.guarded(lambda: fails(errno.ENOSPC)) == exits.FAILED
    assert capsys.readouterr().err == "error: some/file: No space left on device\n"
    with pytest.raises(FileNotFoundError):  # nobody expected it
        exits.guarded(lambda: fails(errno.ENOENT))
