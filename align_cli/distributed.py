"""The ranks of a run: who this process is, and the few things that ranks say to each other."""

import ctypes
import os
import signal
import sys
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from align_cli.errors import UserError

# transformers imports DeepSpeed, which looks for a device at once and complains where there is none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

TIMEOUT = timedelta(minutes=60)  # one rank may evaluate or export for long while the others wait


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_per_node() -> int | None:
    """Ranks of each node, as torchrun or srun has told them; None where they do not lie on nodes in equal blocks.

    Every rank calls it.
    """
    one = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE")
    if one is None:  # such as 8, or 8(x2); nodes that differ are 8,4
        one = os.environ.get("SLURM_TASKS_PER_NODE", str(world())).partition("(x")[0]
    told = gather((one, os.environ.get("LOCAL_RANK", "0")))
    size = int(told[0][0]) if told[0][0].isdecimal() else 0
    return size if size > 0 and told == [(str(size), str(place % size)) for place in range(world())] else None


def local_device(accelerator: str) -> torch.device:
    """The device of this process, which uses it from here on: its own GPU, or the CPU.

    Args:
        accelerator: `gpu`, `cpu`, or `auto` for a GPU where there is one.

    Raises:
        UserError: there are fewer GPUs than ranks.
    """
    if device_type(accelerator) == "cpu":
        return torch.device("cpu")
    place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= there:
        raise UserError(
            f"rank {place} of this node has no GPU of its own: PyTorch sees {there}. Use fewer ranks, or "
            "under srun --gpus-per-node in place of --gpus-per-task and --gpu-bind."
        )
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    return device


def device_type(accelerator: str) -> Literal["cuda", "cpu"]:
    """The kind of device that ranks have; to ask takes no memory of a GPU, as to use one does.

    Args:
        accelerator: `gpu`, `cpu`, or `auto` for a GPU where there is one.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    return "cpu" if on_cpu else "cuda"


def join(device: torch.device) -> None:
    """Enter the process group that the environment describes; one process makes a group of its own."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    # DeepSpeed makes groups of its own without saying how long they wait; NCCL's ten minutes would end a run.
    for name in ("default_pg_nccl_timeout", "default_pg_timeout"):
        setattr(distributed_c10d, name, TIMEOUT)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=TIMEOUT)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends (Linux only).

    Args:
        parent: the number of the process that started this one, which may have ended already.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        dist.barrier()


def gather(thing: Any) -> list[Any]:
    """The `thing` of every rank, in the order of ranks, on every rank."""
    if world() == 1:
        return [thing]
    things: list[Any] = [None] * world()
    dist.all_gather_object(things, thing)
    return things


def from_first(values: Tensor) -> Tensor:
    """The `values` of rank 0, on every rank; the same shape everywhere."""
    if world() > 1:
        values = values.contiguous()
        dist.broadcast(values, 0)
    return values


def any_rank(flag: bool) -> bool:
    """Whether the flag is up on any rank."""
    return any(gather(flag))


def total(values: Tensor, device: torch.device) -> Tensor:
    """Sum of `values` over ranks, on the CPU in float64."""
    summed = values.to(device=device, dtype=torch.float64, copy=True)
    if world() > 1:
        dist.all_reduce(summed)
    return summed.cpu()
