"""`align doctor`: versions, devices, what works on this machine, and what to do about the rest."""

import importlib
import importlib.metadata
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from align_cli import config, paths, process, rundir, terminal, tracking
from align_cli.commands.arguments import Parser
from align_cli.errors import UserError

State = Literal["ok", "note", "missing"]
EXTRAS = {  # package -> the extra that brings it, and who asks for it
    "lm-eval": ("eval", "eval=harness"),
    "math-verify": ("eval", "eval=gsm8k and the like"),
    "openai": ("eval", "judge="),
    "pycodestyle": ("scorers", "scorer=pycodestyle"),
    "spacy": ("scorers", "scorer=entities"),
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do where it is not well."""

    state: State
    what: str
    said: str
    advice: str = ""


def python() -> Finding:
    """The interpreter."""
    version = sys.version.split()[0]
    if (3, 11) <= sys.version_info < (3, 14):
        return Finding("ok", "python", version)
    return Finding("missing", "python", version, "align is tested on Python 3.11, 3.12 and 3.13")


def packages() -> list[Finding]:
    """Every package that decides what a run computes."""
    optional = {"bitsandbytes": "only adapter=qlora needs it, on a GPU: pip install bitsandbytes"}
    return [
        Finding("ok", name, version)
        if version is not None
        else Finding("note", name, "not installed", optional[name])
        if name in optional
        else Finding("missing", name, "not installed", "pip install -e . -c constraints.txt")
        for name, version in rundir.versions().items()
        if name != "python"
    ]


def extras() -> list[Finding]:
    """What evaluations and scorers ask for beside what align always needs."""
    found: list[Finding] = []
    for name, (extra, use) in EXTRAS.items():
        try:
            found.append(Finding("ok", name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            advice = f"only {use} needs it: pip install 'align-cli[{extra}]'"
            found.append(Finding("note", name, "not installed", advice))
    return found


def sandbox() -> Finding:
    """Whether programs that a model has written can be kept apart (`code.run=true`)."""
    from align_cli.sandbox import Code, opened

    code = config.build(Code, config.compose("evaluate", ["code.run=true"])["code"])
    try:
        found = opened(code)
        return Finding("ok" if found.level == "namespaces" else "note", "sandbox", found.isolation)
    except UserError as error:
        return Finding("note", "sandbox", "eval=humaneval, mbpp and leetcode cannot be run", str(error))


def devices() -> Finding:
    """What the runs compute on."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("ok", "device", f"{len(names)} GPU: {', '.join(sorted(set(names)))}")
    said = f"no GPU; CPU with {process.cores()} cores, {torch.get_num_threads()} threads"
    if shutil.which("nvidia-smi"):
        return Finding("missing", "device", said, "there is an NVIDIA driver, and this torch was built without CUDA")
    return Finding(
        "note", "device", said, "model=tiny runs here in minutes; models of billions of parameters need a GPU"
    )


def bf16() -> Finding:
    """Whether half of the memory is saved at no loss of speed."""
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("ok", "bf16", "the GPU computes in it")
        return Finding("note", "bf16", "the GPU does not compute in it", "train in fp32")
    if torch.backends.mkldnn.is_available():
        product = torch.ones(2, 2, dtype=torch.bfloat16) @ torch.ones(2, 2, dtype=torch.bfloat16)
        assert product.sum().item() == 8
        return Finding(
            "ok", "bf16", "works on this CPU", "engine.precision=auto measures whether it is faster than fp32"
        )
    return Finding("note", "bf16", "this torch has no oneDNN", "train in fp32")


def gloo() -> Finding:
    """Ranks on the CPU: whether a group of one can be made and used."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return Finding("missing", "gloo", "this torch has no gloo", "several ranks on the CPU need another torch")
    one = torch.ones(1)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] - documented, and left out of __all__
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    dist.all_reduce(one)
    dist.destroy_process_group()
    return Finding("ok", "gloo", "ranks on the CPU can talk to each other")


def nccl() -> Finding:
    """Ranks on GPUs."""
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl as library

    if not torch.cuda.is_available():
        return Finding("note", "nccl", "not needed without a GPU")
    if dist.is_nccl_available():
        return Finding("ok", "nccl", ".".join(map(str, library.version())))
    return Finding("missing", "nccl", "this torch has no NCCL", "several GPUs need a torch that was built with it")


def deepspeed() -> Finding:
    """engine=zero0 to zero3."""
    logging.disable(logging.WARNING)  # it warns of a machine without a GPU, which has its own line here
    try:
        importlib.import_module("deepspeed")
        accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    finally:
        logging.disable(logging.NOTSET)
    return Finding("ok", "zero0 to 3", f"DeepSpeed imports; its accelerator is {accelerator.device_name()}")


def wandb() -> Finding:
    """Where Weights & Biases puts a run."""
    mode = tracking.wandb_mode()
    if mode == "offline":
        return Finding("note", "wandb", "offline", "`wandb login`, or WANDB_API_KEY, sends runs to the server")
    return Finding("ok", "wandb", mode)


def hub() -> Finding:
    """Whether models and datasets may be fetched."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return Finding(
                "note", "hub", f"offline ({name} is set)", "what is in its cache, and local paths, still work"
            )
    from huggingface_hub import get_token

    if get_token() is None:
        return Finding("note", "hub", "no token", "gated models need one: `hf auth login`, or HF_TOKEN")
    return Finding("ok", "hub", "a token is there")


def cache() -> Finding:
    """Where what can be made again is kept, and how much fits."""
    folder = paths.cache()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if not os.access(existing, os.W_OK):
        return Finding("missing", "cache", f"{folder} cannot be written", "ALIGN_CACHE names another folder")
    return Finding("ok", "cache", f"{folder}, {free:.0f} GiB free")


def configuration() -> Finding:
    """Whether the groups and recipes that ship with align are there."""
    groups = sorted(path.name for path in paths.conf().iterdir() if path.is_dir()) if paths.conf().is_dir() else []
    if "algo" not in groups or not paths.recipes().is_dir():
        return Finding(
            "missing", "configuration", f"not at {paths.conf()}", "the installation is incomplete: install again"
        )
    return Finding("ok", "configuration", str(paths.conf()))


CHECKS: tuple[Callable[[], Finding], ...] = (
    devices,
    bf16,
    gloo,
    nccl,
    deepspeed,
    wandb,
    hub,
    cache,
    configuration,
    sandbox,
)


def examine(check: Callable[[], Finding]) -> Finding:
    """A check's finding, or what stopped it."""
    try:
        return check()
    # a check fails in whatever way the broken library fails, and the other lines are still wanted
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding("missing", check.__name__, said, "install the versions of constraints.txt")


def main(argv: list[str]) -> int:
    """Print a line for each finding; the exit code is 0 whatever is found."""
    parser = Parser(prog="align doctor", description=__doc__)
    parser.parse_args(argv)
    colours: dict[State, terminal.Style] = {"ok": "green", "note": "yellow", "missing": "red"}
    findings = [python(), *packages(), *extras(), *map(examine, CHECKS)]
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        state = terminal.paint(f"{finding.state:<7}", colours[finding.state], sys.stdout)
        advice = f" ({finding.advice})" if finding.advice else ""
        terminal.result(f"{state}  {finding.what:<{width}}  {finding.said}{advice}")
    missing = [finding.what for finding in findings if finding.state == "missing"]
    terminal.say(f"missing: {', '.join(missing)}" if missing else "everything that align needs is here")
    return 0
