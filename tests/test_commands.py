"""`align ls`, `show`, `cp` and `doctor` say what there is and what works."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from align_cli import paths, rundir, terminal
from align_cli.commands import doctor, listing
from align_cli.errors import UserError


def test_ls_names_every_group_and_its_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    algorithms = next(line for line in lines if line.startswith("algo "))
    assert {"nca", "info_nca", "dpo", "exo"} <= set(algorithms.split())
    assert any(line.startswith("recipes ") for line in lines)


def test_ls_of_a_group_says_what_each_choice_is(capsys: pytest.CaptureFixture[str]) -> None:
    for spelling in ("algo", "algos"):
        assert listing.main(["ls", spelling]) == 0
        assert "NCA: Noise Contrastive Alignment." in capsys.readouterr().out
    with pytest.raises(UserError, match="did you mean model"):
        listing.main(["ls", "modle"])
    assert listing.main(["ls", "scorer"]) == 0  # without what an example brings: it comes by itself
    told = capsys.readouterr().out
    assert "noisy_addition" in told and "tiny-toy" not in told


@pytest.mark.parametrize("name", ["algo/nca", "nca", "algo=nca", "algo/nca.yaml"])
def test_show_prints_the_file_that_a_name_means(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["show", name]) == 0
    assert "name: nca\n" in capsys.readouterr().out


def test_show_of_a_wrong_name_says_what_would_be_right() -> None:
    with pytest.raises(UserError, match="did you mean algo/info_nca"):
        listing.main(["show", "infonca"])
    with pytest.raises(UserError, match=r"could be .*adapter/none.*track/none"):
        listing.main(["show", "none"])


def test_cp_copies_and_never_overwrites(tmp_path: Path) -> None:
    assert listing.main(["cp", "nca", str(tmp_path / "mine")]) == 0
    assert listing.main(["cp", "dpo", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo.yaml", "mine.yaml"]
    copied = (tmp_path / "mine.yaml").read_bytes()
    with pytest.raises(UserError, match=r"mine\.yaml exists"):
        listing.main(["cp", "dpo", str(tmp_path / "mine.yaml")])
    assert (tmp_path / "mine.yaml").read_bytes() == copied


def test_ls_runs_shows_what_was_chosen_what_came_out_and_who_is_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert listing.main(["ls", "runs"]) == 0
    assert "no runs under runs or sweeps" in capsys.readouterr().err
    for name in ("a", "b", "c", "d"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        rundir.write_config(tmp_path / "runs" / name, {"algo": {"name": "exo"}, "model": {"name": "tiny"}})
    rundir.write_summary(tmp_path / "runs/a", {"steps": 20, "loss/last": 0.693147})
    (tmp_path / "runs/c/metrics.jsonl").touch()
    (tmp_path / "runs/d/config.yaml").write_text("hydra: {}")
    with rundir.lock(tmp_path / "runs/b"):
        assert listing.main(["ls", "runs"]) == 0
    a, b, c, d = capsys.readouterr().out.splitlines()[1:]
    assert a.split() == ["runs/a", "exo", "tiny", "20", "0.6931", "finished"]
    assert "in use by process" in b and c.endswith("stopped") and "unreadable" in d
    assert listing.main(["show", "runs/a"]) == 0
    assert capsys.readouterr().out.splitlines() == ["steps      20", "loss/last  0.693147"]


def test_listing_starts_without_heavy_libraries() -> None:
    program = (
        "import sys; from align_cli.commands import listing; listing.main(['ls', 'algo']);"
        "sys.exit(str(sorted({'torch', 'transformers', 'wandb', 'hydra', 'deepspeed', 'datasets'} & set(sys.modules))))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.stderr.strip() == "[]"


def test_doctor_says_which_extras_are_there_and_what_brings_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"lm-eval": "0.4", "pycodestyle": "2.14"}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {each.what: each for each in doctor.extras()}
    assert {name for name, each in found.items() if each.state == "ok"} == set(there)
    assert "align-cli[eval]" in found["openai"].advice and "align-cli[scorers]" in found["spacy"].advice
    project = tomllib.loads((paths.conf().parent / "pyproject.toml").read_text())["project"]
    for name, (extra, _) in doctor.EXTRAS.items():
        assert any(re.match(rf"{name}\b", line) for line in project["optional-dependencies"][extra]), name


def test_doctor_says_how_programs_are_kept_apart_or_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    found = doctor.sandbox()
    assert (found.state, found.what) == ("note", "sandbox") and "works on Linux alone" in found.advice


def test_doctor_has_a_line_for_everything_and_ends_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> doctor.Finding:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    # DeepSpeed's import is slow and has its own tests
    monkeypatch.setattr(
        doctor, "CHECKS", (doctor.devices, doctor.bf16, doctor.gloo, doctor.cache, doctor.wandb, broken)
    )
    assert doctor.main([]) == 0
    out, err = capsys.readouterr()
    for what in ("python", "torch", "hydra-core", "device", "bf16", "gloo", "cache", "wandb"):
        assert any(line.split()[1] == what for line in out.splitlines()), what
    assert "missing  broken" in out and "libcudart.so.13" in out
    assert err == "missing: broken\n"


def test_colour_needs_a_terminal_and_no_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert terminal.paint("ok", "green", sys.stdout) == "\x1b[32mok\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.paint("ok", "green", sys.stdout) == "ok"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert terminal.paint("ok", "green", sys.stdout) == "ok"
