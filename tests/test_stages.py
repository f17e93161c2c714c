"""engine=auto: the lowest ZeRO stage that fits, and why; hpZ across nodes; what the head needs on the way."""

import ast
import math
import os
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forks import HANGS
from small_runs import align, largest_difference, losses, overrides, read, weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from align_cli import config, distributed, engine, memory, reading, resources, run, rundir
from align_cli.engine import EngineOptions, Optimizer
from align_cli.errors import UserError
from align_cli.experiment import Experiment
from align_cli.models import head
from align_cli.models.head import HeadLogprobs, Transform

STAGES = ("zero1", "zero2", "zero3")  # zero0 is fp32 alone
MISTRAL = ("algo=nca", "model=mistral7b", "data=ultrafeedback", "adapter=none")
FULL = (*MISTRAL, "engine.gradient_checkpointing=true", "engine.micro_tokens=8192")
GPU = ("launch.accelerator=gpu", "launch.devices=8", "run.dir=nowhere")


def needed(chosen: Experiment, stage: str, shape: memory.Shape) -> float:
    """Bytes that a run would need at another stage."""
    other = read([*FULL, *GPU, f"engine={stage}", f"launch.memory_gb={chosen.launch.memory_gb}"])
    return sum(resources.terms(other, shape).values())


@pytest.mark.parametrize("gb, stage", [(200, "zero1"), (100, "zero1"), (60, "zero2"), (33, "zero3")])
def test_the_lowest_stage_that_leaves_a_tenth_free_is_chosen(gb: int, stage: str) -> None:
    chosen = read([*FULL, *GPU, f"launch.memory_gb={gb}"])
    assert chosen.engine.name == chosen.tree["engine"]["name"] == stage
    assert chosen.choice is not None and chosen.choice.fits
    shape = memory.shape(chosen.model, chosen.adapter)
    place = STAGES.index(stage)
    assert needed(chosen, stage, shape) <= 0.9 * gb * 1e9
    assert all(needed(chosen, lower, shape) > 0.9 * gb * 1e9 for lower in STAGES[:place])
    told = f"{needed(chosen, STAGES[max(place - 1, 0)], shape) / 1e9:.1f} of {gb:.1f} GB a GPU (launch.memory_gb)"
    wants = f"{STAGES[place - 1]} would need" if place else "it needs"
    assert chosen.choice.reason.startswith(f"engine={stage}: {wants} {told}")


def test_stage_0_is_chosen_in_fp32_alone() -> None:
    chosen = read([*FULL, *GPU, "engine.precision=fp32", "launch.memory_gb=400"])
    assert chosen.engine.name == "zero0" and chosen.choice is not None
    assert chosen.choice.reason.startswith("engine=zero0: it needs")
    with pytest.raises(UserError, match=r"engine=zero0 engine\.precision=bf16.*engine=zero1"):
        read([*FULL, *GPU, "engine=zero0", "engine.precision=bf16"])


def test_what_the_margin_alone_refuses_is_said() -> None:
    shape = memory.shape((some := read([*FULL, *GPU, "launch.memory_gb=80"])).model, some.adapter)
    gb = needed(some, "zero2", shape) / 1e9 + 0.1
    chosen = read([*FULL, *GPU, f"launch.memory_gb={gb}"])
    assert chosen.engine.name == "zero3" and chosen.choice is not None
    assert chosen.choice.reason.endswith("of which 10% are left free")


def test_one_rank_is_plain_pytorch_whatever_it_needs() -> None:
    alone = read([*FULL, *GPU, "launch.devices=1", "launch.memory_gb=1"])
    assert alone.engine.name == "torch" and alone.choice is not None
    assert alone.choice.reason == "engine=torch: there is one rank"


@pytest.mark.parametrize("gb", [45, 70, 80, 200, 2000])
def test_micro_batches_are_the_largest_that_leave_a_tenth_free(gb: int) -> None:
    given = [*MISTRAL, *GPU, "engine=zero3", f"launch.memory_gb={gb}"]
    chosen = read(given)
    tokens = chosen.engine.micro_tokens
    assert chosen.tree["engine"]["micro_tokens"] == tokens  # what the run directory will say
    shape = memory.shape(chosen.model, chosen.adapter)

    def fits(budget: int) -> bool:
        other = read([*given, f"engine.micro_tokens={budget}"])
        return sum(resources.terms(other, shape).values()) <= 0.9 * gb * 1e9

    assert fits(tokens) or tokens == resources.BUDGETS[0]
    assert not fits(2 * tokens) or tokens == resources.BUDGETS[-1]


def test_the_reason_of_a_stage_tells_the_micro_batches_that_it_leaves_room_for() -> None:
    chosen = read([*MISTRAL, *GPU, "launch.memory_gb=200"])
    assert chosen.choice is not None
    assert chosen.choice.reason.endswith(f"micro-batches of {chosen.engine.micro_tokens:,} tokens")


def test_on_a_cpu_and_for_the_embedded_world_micro_batches_have_one_size() -> None:
    for given in (["launch.accelerator=cpu", *MISTRAL], ["launch.accelerator=gpu", "algo=nca"]):
        assert read([*given, "run.dir=nowhere"]).engine.micro_tokens == resources.BUDGET


def test_a_large_model_on_a_machine_without_gpus_is_measured_by_that_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["algo=nca", "model=qwen2_5_0_5b", "run.dir=nowhere"]
    here = read(given)
    assert here.engine.micro_tokens == resources.BUDGET and not resources.on_gpu(here)
    two = read([*given, "launch.devices=2"])
    assert two.choice is not None and "this machine's memory over 2 ranks" in two.choice.reason
    # planned or prepared, it is for GPUs that are elsewhere
    planned = reading.read(here.tree | {"engine": {**here.tree["engine"], "micro_tokens": "auto"}}, planned=True)
    for other in (planned, read([*given, "launch=prepare"])):
        assert other.engine.micro_tokens > resources.BUDGET and resources.on_gpu(other)


def test_a_named_engine_stays_and_needs_no_reason() -> None:
    named = read([*FULL, *GPU, "engine=zero3", "launch.memory_gb=1000"])
    assert named.engine.name == "zero3" and named.choice is None


def test_four_bit_weights_are_never_partitioned() -> None:
    chosen = read(["algo=nca", "model=mistral7b", "adapter=qlora", *GPU, "launch.memory_gb=1"])
    assert chosen.engine.name in STAGES[:2] and chosen.choice is not None and not chosen.choice.fits


def test_ranks_on_a_cpu_share_its_memory() -> None:
    there, _ = memory.device_bytes(None, gpu=False, ranks=1)
    part, source = memory.device_bytes(None, gpu=False, ranks=3)
    assert part == there / 3 and source == "this machine's memory over 3 ranks"
    assert memory.device_bytes(5.0, gpu=False, ranks=3)[0] == 5e9


def test_nodes_keep_a_copy_of_the_weights_under_hpz() -> None:
    given = (*FULL, *GPU, "engine=zero3", "launch=prepare", "launch.devices=32", "launch.memory_gb=80")
    spread, local = read(given), read([*given, "launch=local"])
    shape = memory.shape(spread.model, spread.adapter)
    more = sum(resources.terms(spread, shape).values()) - sum(resources.terms(local, shape).values())
    assert more == pytest.approx(7_241_732_096 * 2 / (torch.cuda.device_count() or 8))


def test_two_ranks_need_no_engine_and_go_on_with_the_one_they_had(
    tiny_model: Path, ragged_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "train.steps=2", "eval.groups=2", "launch.devices=2")
    assert align("train", *given) == 0
    assert "engine=zero1: it needs 0." in capfd.readouterr().err
    told = rundir.read_config(tmp_path / "run")
    assert told["engine"]["name"] == "zero1"

    told["engine"]["name"] = "zero2"  # as if there had been less memory when it began
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(told))
    assert read(given).engine.name == "zero2"
    assert align("train", *given) == 0
    assert "is finished already" in capfd.readouterr().out
    assert align("train", *given, "launch.devices=1") == 2
    assert "launch.devices: 2 -> 1" in capfd.readouterr().err


def test_what_no_stage_can_hold_is_refused_before_anything_is_written(
    tiny_model: Path, ragged_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "launch.devices=2", "launch.memory_gb=0.01")
    assert align("train", *given) == 2
    told = capsys.readouterr().err
    assert "no stage needs less" in told and "align plan tells" in told and "if named, is started" in told
    assert not (tmp_path / "run").exists()
    assert align("plan", *given) == 1
    assert "no stage needs less" in capsys.readouterr().out


@pytest.mark.parametrize(
    "algo, stage, told",
    [
        (["rloo", "scorer=compiles"], "zero3", True),
        (["rloo", "scorer=compiles"], "zero2", False),
        (["nca"], "zero3", False),
    ],
)
def test_a_run_says_that_sampling_from_partitioned_weights_is_slow(algo: list[str], stage: str, told: bool) -> None:
    given = [f"algo={algo[0]}", *algo[1:], "model=mistral7b", "data=ultrafeedback", *GPU, f"engine={stage}"]
    assert bool(run._slow_sampling(read(given))) == told


# --- bfloat16

GRADIENTS = """
import torch
from align_cli import config, distributed, engine
from align_cli.engine import EngineOptions, Optimizer
from align_cli.models.causal import Manner

device = torch.device("cpu")
distributed.join(device)
engine.settle_deepspeed(device)
options = EngineOptions(**config.compose("train", ["engine=zero1", "engine.precision=bf16"])["engine"])
optimizer = Optimizer(**config.compose("train", [])["optimizer"])
made = engine.deepspeed_config(options, optimizer, device, alone=True)
network = torch.nn.Linear(3, 2, bias=False).bfloat16()
stage1 = engine.DeepSpeedEngine(network, device, manner=Manner(flat=False), config=made, optimizer=optimizer)
for scale in (1.0, 2.0**-10):
    stage1.backward(scale * stage1.engine(torch.ones(1, 3, dtype=torch.bfloat16)).sum().float())
print(network.weight.grad, float(stage1.step(0.0)))
"""


def test_gradients_of_stage_1_are_summed_in_float32_and_held_once() -> None:
    said = subprocess.run([sys.executable, "-c", GRADIENTS], capture_output=True, text=True, check=True).stdout
    kept, norm = said.splitlines()[-1].split()
    assert kept == "None"  # of the bfloat16 gradients
    # six weights whose gradients are 1 + 2^-10, which bfloat16, with its 8 bits, takes for 1
    assert float(norm) == pytest.approx(math.sqrt(6) * (1 + 2**-10), rel=1e-6)


UNWRITTEN = f"""import sys
from pathlib import Path
{GRADIENTS.partition("for scale")[0]}
import deepspeed.comm as dist
def full(*given, **named): raise OSError(28, "No space left on device")
met, meet, write = [], dist.barrier, torch.save
dist.barrier = lambda *given, **named: (met.append(1), meet(*given, **named))
stage1.save(Path(sys.argv[1]) / "whole")
whole, torch.save = len(met), full
try:
    stage1.save(Path(sys.argv[1]) / "cut")
except OSError as error:
    print(error.errno, whole, len(met) - whole)
torch.save = write
stage1.save(Path(sys.argv[1]) / "again")
print(sorted(path.name for path in Path(sys.argv[1]).glob("*/deepspeed/*") if path.stat().st_size))
"""


def test_a_part_of_a_checkpoint_that_cannot_be_written_keeps_no_rank_from_meeting_the_others(tmp_path: Path) -> None:
    told = subprocess.run([sys.executable, "-c", UNWRITTEN, str(tmp_path)], capture_output=True, text=True, check=True)
    cut, files = told.stdout.splitlines()[-2:]
    errno, whole, met = map(int, cut.split())
    assert errno == 28 and whole == met > 1
    assert len(ast.literal_eval(files)) == 2 * len(set(ast.literal_eval(files))) > 0  # those of the first and the third


@pytest.mark.parametrize(
    "there, native, device, dtype",
    [
        (True, True, "cuda", torch.bfloat16),
        (True, False, "cuda", torch.float32),  # such as a V100, which emulates it
        (True, True, "cpu", torch.float32),
        (False, False, "cuda", torch.bfloat16),  # a plan
    ],
)
def test_precision_follows_what_the_gpu_computes_in(
    there: bool, native: bool, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    options = EngineOptions(**config.compose("train", [])["engine"])
    assert options.dtype(torch.device(device)) == dtype


# --- hpZ


def config_of(stage: str, *, alone: bool = True, device: str = "cpu") -> dict[str, Any]:
    options = EngineOptions(**config.compose("train", [f"engine={stage}"])["engine"])
    optimizer = Optimizer(**config.compose("train", [])["optimizer"])
    return engine.deepspeed_config(options, optimizer, torch.device(device), alone=alone)


def zero_of(stage: str, *, alone: bool = True) -> dict[str, Any]:
    return config_of(stage, alone=alone)["zero_optimization"]


@pytest.mark.parametrize("stage, buckets", [("zero1", 0), ("zero2", 2), ("zero3", 1)])
def test_what_deepspeed_may_hold_beside_the_weights_is_planned(
    stage: str, buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # whatever its kind is: a plan is for bf16
    zero = config_of(stage, device="cuda")["zero_optimization"]
    assert zero["overlap_comm"] == (stage != "zero1")  # under stage 2 a bucket fills while another is summed
    small = read(["algo=nca", "model=gpt2_large", "data=ultrafeedback", *GPU, f"engine={stage}"])
    terms = resources.terms(small, memory.shape(small.model, small.adapter))
    assert terms.get("buckets of gradients", 0) == buckets * zero["reduce_bucket_size"] * 2
    if stage == "zero3":  # two of its 36 layers are less than this
        assert terms["gathered layers"] == zero["stage3_max_live_parameters"] * 2


@pytest.mark.parametrize("stage", ["zero0", *STAGES])
def test_no_clock_of_deepspeed_waits_for_the_device(stage: str) -> None:
    from deepspeed.utils.config import get_timers_config

    assert not get_timers_config(config_of(stage)).enabled


@pytest.mark.parametrize(
    "told, world, size",
    [
        ({"LOCAL_WORLD_SIZE": "4"}, 8, 4),
        ({"SLURM_NTASKS_PER_NODE": "4"}, 8, 4),
        ({"SLURM_TASKS_PER_NODE": "4(x2)"}, 8, 4),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_TASKS_PER_NODE": "1"}, 8, 4),
        ({"SLURM_TASKS_PER_NODE": "4,2"}, 6, None),  # unequal nodes
        ({"LOCAL_WORLD_SIZE": "4"}, 4, None),  # one node
        ({"LOCAL_WORLD_SIZE": "1"}, 4, None),  # a rank on each node
        ({}, 4, None),
    ],
)
def test_zero_3_over_nodes_keeps_the_weights_of_the_backward_pass_within_a_node(
    told: dict[str, str], world: int, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    local = int(next(iter(told.values()), str(world))[0])
    monkeypatch.setattr(distributed, "world", lambda: world)
    monkeypatch.setattr(distributed, "gather", lambda mine: [(mine[0], str(r % local)) for r in range(world)])
    assert zero_of("zero3").get("zero_hpz_partition_size") == size
    assert "zero_hpz_partition_size" not in zero_of("zero2")
    assert "zero_hpz_partition_size" not in zero_of("zero3", alone=False)
    # srun --distribution=cyclic deals ranks out over the nodes
    monkeypatch.setattr(distributed, "gather", lambda mine: [(mine[0], str(r // 2)) for r in range(world)])
    assert "zero_hpz_partition_size" not in zero_of("zero3")


# Parameters as small as the tests' stay whole on every rank unless that is switched off.
RANK = """
import sys
from align_cli import assembly
plain = assembly.deepspeed_config
def partitioned(*given, **named):
    made = plain(*given, **named)
    assert made["zero_optimization"]["zero_hpz_partition_size"] == 2
    made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return made
assembly.deepspeed_config = partitioned
import ranks
from align_cli import distributed, terminal
terminal.quiet_libraries()
distributed.die_with_parent(int(sys.argv[1]))
ranks.rank(sys.argv[2:])
"""


def test_two_nodes_of_two_ranks_compute_what_one_process_computes(
    tiny_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    settings = ("algo.beta=0.1", "optimizer.eps=1e-3", "train.steps=3", "eval.groups=2")
    assert align("train", *overrides(tiny_model, ragged_file, tmp_path / "one", *settings)) == 0
    (nodes := tmp_path / "nodes").mkdir()
    spread = overrides(tiny_model, ragged_file, nodes, *settings, "engine=zero3", "launch.devices=4")
    rundir.write_config(nodes, config.compose("train", spread))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": port, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(os.getpid()), str(nodes)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank % 2)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(4)
    ]
    try:
        for process in ranks:
            said = process.communicate(timeout=HANGS)[0].decode()
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert losses(nodes) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert largest_difference(weights(nodes), weights(tmp_path / "one")) < 1e-6


# --- the head


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that live at once, of those that are made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                if place not in given and place not in self.known:
                    self.known[place] = storage.nbytes()
                    weakref.finalize(storage, self.known.pop, place, None)
        self.peak = max(self.peak, sum(self.known.values()))
        return made


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows", [96, 40])
@pytest.mark.parametrize("gpu", [True, False])
def test_the_planned_memory_of_the_head_is_what_it_takes(
    trained: bool, rows: int, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, hidden, vocabulary = 96, 64, 512
    cached = vocabulary * scored if gpu else vocabulary * 8  # on a GPU all rows of a chunk are normalised together
    monkeypatch.setattr(head, "CACHED", cached)
    monkeypatch.setattr(memory, "CACHED", cached)
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(2 * scored, hidden, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, generator=generator).requires_grad_(trained)
    targets = torch.randint(vocabulary, (scored,), generator=generator)
    keep = torch.arange(scored)
    budget = rows * vocabulary * 4
    with Alive() as alive:
        found: Any = HeadLogprobs.apply(every[keep], weight, None, targets, Transform(), budget)
        found.sum().backward()
    planned = memory.head(scored, hidden, vocabulary, 4, budget=budget, trained=trained, gpu=gpu)
    assert alive.peak <= planned < 1.6 * alive.peak


def test_the_model_s_own_head_needs_all_logits_at_once() -> None:
    chunked, plain = (read([*FULL, *GPU, "engine=zero3", *more]) for more in ((), ("model.head=plain",)))
    shape = memory.shape(plain.model, plain.adapter)
    scored = 8192 * 4 * 305 / (185 + 4 * 305)
    assert resources.terms(plain, shape)["logits"] == pytest.approx(scored * 32000 * 10, rel=1e-3)
    assert resources.terms(chunked, shape)["logits"] < 2.3e9
