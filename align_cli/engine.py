"""The machine behind a few verbs: measure, backward, step, save, load, export.

`TorchEngine` is one process in plain PyTorch; `DeepSpeedEngine` is any number of ranks at ZeRO stage 0 to 3. A step's
gradient is the sum over all micro-batches and ranks of what `backward` was given, so a caller who divides by the
global count gets the same gradient however the step is split.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align_cli import distributed, process
from align_cli.data.batches import MicroBatch
from align_cli.models.causal import Manner, measure
from align_cli.models.scalar import VALUE
from align_cli.ranges import Count, Fraction, NonNegative, Positive

Network = PreTrainedModel | PeftModel

NEVER = 1e30  # a norm that no gradient reaches
BUCKET = 50_000_000  # elements of gradients that DeepSpeed sums over ranks at a time
LIVE = 300_000_000  # weights that ZeRO-3 may hold whole, beyond those of the layer at work


def gpu_dtype() -> torch.dtype:
    """bf16 where the GPU computes in it, or is only planned for; fp32 where it is older than Ampere and emulates it."""
    emulates = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float32 if emulates else torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The `engine` section of the configuration."""

    name: Literal["torch", "zero0", "zero1", "zero2", "zero3"]
    precision: Literal["auto", "fp32", "bf16"]
    micro_tokens: Count
    logits_mb: Count
    selective_recompute: bool
    gradient_checkpointing: bool

    @property
    def stage(self) -> int | None:
        """The ZeRO stage, or None in plain PyTorch."""
        return None if self.name == "torch" else int(self.name[-1])

    @property
    def sparing(self) -> bool:
        """Whether norms and gated products are computed again in the backward pass.

        Checkpointing computes all of a layer again anyway; under ZeRO-3 a norm's weights may be away by then.
        """
        return self.selective_recompute and not self.gradient_checkpointing and self.stage != 3

    def dtype(self, device: torch.device) -> torch.dtype:
        """The type of weights and activations; auto is `gpu_dtype` on a GPU, fp32 on a CPU until a run tries there."""
        if self.precision == "auto":
            return gpu_dtype() if device.type == "cuda" else torch.float32
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The `optimizer` section of the configuration: AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

    betas: list[Fraction]
    eps: Positive
    weight_decay: NonNegative
    max_grad_norm: Positive | None


class Measuring:
    """A network that is measured."""

    def __init__(self, network: Network, device: torch.device, *, manner: Manner):
        self.network = network
        self.device = device
        self.manner = manner
        self.largest = 0  # tokens of a row that was trained on

    @property
    def collective(self) -> bool:
        """Whether a forward pass exchanges weights, so that every rank must call it alike."""
        return False

    def module(self) -> nn.Module:
        """What a forward pass must call."""
        return self.network

    def measure(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The policy's columns, with gradient (`align_cli.models.causal.measure`)."""
        tokens = batch.input_ids.shape[1]
        if torch.is_grad_enabled() and tokens > self.largest:
            self.largest = tokens
            process.trim()
        return measure(self.module(), batch, self.manner)


class Engine(Measuring, ABC):
    """A network that trains, on this rank's share of every step."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this rank's scalar `loss` to the step's gradient."""

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Clip, update, clear; returns the norm of the step's gradient before clipping, ()."""

    @contextmanager
    def parts(self) -> Iterator[dict[str, Tensor]]:
        """This rank's part of each trained weight, as a forward pass computes with it.

        What the block changes in them, in place, holds from its end on; every rank enters it.
        """
        yield {name: parameter.detach() for name, parameter in trainable(self.network).items()}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what resuming needs; every rank calls it."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote; every rank calls it."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Whole trained weights on the CPU of rank 0, {} elsewhere; every rank calls it."""

    def export(self, folder: Path) -> None:
        """Write an ordinary Hugging Face folder, or a peft folder for adapters; every rank calls it."""
        weights = self.weights()
        if distributed.rank() == 0:
            # A critic is of use to its own run alone; what is left is an ordinary causal language model. Of an adapted
            # network's weights peft takes what belongs to the adapters.
            weights = {name: weight for name, weight in weights.items() if not name.startswith(f"{VALUE}.")}
            self.network.save_pretrained(str(folder), state_dict=weights, safe_serialization=True)
        distributed.barrier()


def trainable(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; a tied one once."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def adamw(parameters: dict[str, nn.Parameter], options: Optimizer) -> torch.optim.AdamW:
    """AdamW; biases and norms are not decayed."""
    groups: list[dict[str, Any]] = [{"params": list(parameters.values()), "weight_decay": 0.0}]
    if options.weight_decay > 0:
        spared = {name for name in parameters if name.endswith("bias") or "norm" in name.lower() or "ln_" in name}
        groups = [
            {"params": [p for n, p in parameters.items() if n not in spared], "weight_decay": options.weight_decay},
            {"params": [p for n, p in parameters.items() if n in spared], "weight_decay": 0.0},
        ]
    beta1, beta2 = options.betas
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=options.eps, fused=True)


class TorchEngine(Engine):
    """One process. Weights below fp32 are updated through fp32 masters."""

    def __init__(self, network: Network, device: torch.device, *, manner: Manner, optimizer: Optimizer):
        super().__init__(network.to(device), device, manner=manner)  # pyright: ignore[reportArgumentType]
        self.max_grad_norm = optimizer.max_grad_norm
        self.parameters = trainable(network)
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        self.optimizer = adamw(self.masters, optimizer)
        self.gradients: dict[str, Tensor] = {}  # of weights below fp32, until the update
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                # Not of the engine itself: a weight that knew it would keep it alive.
                parameter.register_post_accumulate_grad_hook(partial(self._collect, self.gradients, name))

    @staticmethod
    def _collect(gradients: dict[str, Tensor], name: str, parameter: Tensor) -> None:
        """Take a gradient as soon as it is there: the first of a step as it is, the sum with a second one in fp32."""
        assert parameter.grad is not None
        there = gradients.get(name)
        gradients[name] = parameter.grad if there is None else there.float().add_(parameter.grad)
        parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        for name in list(self.gradients):
            self.masters[name].grad = self.gradients.pop(name).float()
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = nn.utils.clip_grad_norm_(list(self.masters.values()), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._publish()
        return norm

    def _publish(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def save(self, folder: Path) -> None:
        tensors = {f"weight/{name}": master.detach().contiguous() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.optimizer.state[master].items():
                tensors[f"{key}/{name}"] = value.contiguous()
        save_file(tensors, folder / "engine.safetensors")

    def load(self, folder: Path) -> None:
        tensors = load_file(folder / "engine.safetensors", device=str(self.device))
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors.pop(f"weight/{name}"))
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            # AdamW keeps its step count on the CPU unless it is fused on a GPU, where it stands beside the moments.
            self.optimizer.state[self.masters[name]][kind] = value
        self._publish()

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu() for name, parameter in self.parameters.items()} | {
            name: parameter.detach().cpu()
            for name, parameter in self.network.named_parameters()
            if not parameter.requires_grad and not isinstance(self.network, PeftModel)
        }


def deepspeed_config(
    options: EngineOptions, optimizer: Optimizer, device: torch.device, *, alone: bool
) -> dict[str, Any]:
    """The whole DeepSpeed configuration; what changed its default in 2026 is written out. Every rank calls it.

    Args:
        alone: whether the process holds one model only.
    """
    low = options.dtype(device) == torch.bfloat16
    limit = float("inf") if optimizer.max_grad_norm is None else optimizer.max_grad_norm
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # A step has as many micro-batches as its tokens need; `step()` is the boundary.
        "managed_gradient_accumulation": False,
        # DeepSpeed tells the norm of a gradient only where it clips; at stage 0 in fp32 it does not tell it then.
        "gradient_clipping": 0.0 if options.stage == 0 and not low else min(limit, NEVER),
        "bf16": {"enabled": low, "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": options.stage,
            "overlap_comm": device.type == "cuda" and options.stage in (2, 3),
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET,
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        # DeepSpeed's own clock would wait for the device before every forward pass.
        "timers": {"throughput": {"enabled": False}},
    }
    if low:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if low and options.stage == 1:
        # Else every bf16 gradient lives on beside its fp32 sum, and sums are rounded to bf16 to be added up over ranks.
        config["bf16"]["immediate_grad_update"] = True
        config["communication_data_type"] = "fp32"
    # DeepSpeed 0.19 refuses a second model under hpZ (its issues 4901 and 7066).
    node = distributed.ranks_per_node() if options.stage == 3 and alone else None
    if node is not None and 1 < node < distributed.world():
        # hpZ (Wang et al. 2023, arXiv:2306.10209): the backward pass gathers weights within a node, not between nodes.
        config["zero_optimization"]["zero_hpz_partition_size"] = node
    return config


@contextmanager
def _kept_errors(writer: Any) -> Iterator[None]:
    """Within the block a part of a checkpoint that cannot be written raises nothing, the block does so at its end.

    DeepSpeed's ranks meet after they have written: one that had left at its error would keep the others waiting.
    """
    plain, errors = writer.save, list[Exception]()

    def save(*given: Any, **named: Any) -> None:
        try:
            plain(*given, **named)
        except Exception as error:  # a full disk shows as OSError, and as torch's RuntimeError
            errors.append(error)

    writer.save = save
    try:
        yield
    finally:
        del writer.save
    if errors:
        raise errors[0]


def settle_deepspeed(device: torch.device) -> None:
    """Have DeepSpeed use this device and keep quiet; before its first collective, which under ZeRO-3 is the loading."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type != "cpu":
        return
    if not isinstance(get_accelerator(), CPU_Accelerator):  # transformers has imported DeepSpeed, which takes a GPU
        set_accelerator(CPU_Accelerator())
    # gloo does without this operator, which would ask for a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def keep_zero3_alive(config: dict[str, Any]) -> object | None:
    """Partition every model that is loaded while the result lives; None below stage 3."""
    if config["zero_optimization"]["stage"] != 3:
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(config)


class DeepSpeedEngine(Engine):
    """Ranks under DeepSpeed, ZeRO stage 0 to 3."""

    def __init__(
        self, network: Network, device: torch.device, *, manner: Manner, config: dict[str, Any], optimizer: Optimizer
    ):
        super().__init__(network, device, manner=manner)
        import deepspeed

        self.stage = config["zero_optimization"]["stage"]
        self.max_grad_norm = optimizer.max_grad_norm
        self.optimizer = adamw(trainable(network), optimizer)
        self.norm: Tensor | None = None
        if config["gradient_clipping"] == 0.0:
            self.optimizer.register_step_pre_hook(self._clip)
        self.engine, *_ = deepspeed.initialize(
            model=network, optimizer=self.optimizer, config=config, dist_init_required=False
        )

    @property
    def collective(self) -> bool:
        return self.stage == 3

    def module(self) -> nn.Module:
        return self.engine

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the gradient of a step is the sum.
        self.engine.backward(loss * distributed.world(), scale_wrt_gas=False)

    def step(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self.norm if self.norm is not None else self.engine.get_global_grad_norm()
        assert norm is not None, "DeepSpeed tells the norm wherever it clips"
        return torch.as_tensor(norm, dtype=torch.float32, device=self.device)  # a plain inf where it overflowed

    @contextmanager
    def parts(self) -> Iterator[dict[str, Tensor]]:
        if self.stage != 3:
            with super().parts() as whole:
                yield whole
            return
        shared: dict[str, Any] = dict(trainable(self.network))
        kept = [parameter for parameter in shared.values() if parameter.ds_persist]
        # DeepSpeed keeps small weights whole beside their parts, and makes them anew in this way after an update.
        if kept:
            kept[0].partition(kept)
        yield {name: parameter.ds_tensor for name, parameter in shared.items()}
        if kept:
            kept[0].all_gather(kept)

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        self.norm = nn.utils.clip_grad_norm_(parameters, limit)

    def save(self, folder: Path) -> None:
        frozen = isinstance(self.network, PeftModel)  # they are read from the model again
        with _kept_errors(self.engine.checkpoint_engine):
            self.engine.save_checkpoint(
                str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=frozen
            )

    def load(self, folder: Path) -> None:
        strict = not isinstance(self.network, PeftModel)
        self.engine.load_checkpoint(
            str(folder), tag="deepspeed", load_lr_scheduler_states=False, load_module_strict=strict
        )

    def weights(self) -> dict[str, Tensor]:
        wanted = (
            trainable(self.network) if isinstance(self.network, PeftModel) else dict(self.network.named_parameters())
        )
        if self.stage != 3:
            return {n: p.detach().cpu() for n, p in wanted.items()} if distributed.rank() == 0 else {}
        import deepspeed

        weights: dict[str, Tensor] = {}
        for name, parameter in wanted.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                if distributed.rank() == 0:
                    weights[name] = parameter.detach().cpu().clone()
        return weights
