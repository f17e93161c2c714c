"""The loop: every algorithm starts at its exact value, and a step's gradient is one thing however it is computed."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from safetensors.torch import load_file
from small_runs import align, largest_difference, losses, overrides, summary, weights
from torch import Tensor, nn

from align_cli import assembly, cli, columns, config, paths, references, run, train
from align_cli.data.batches import members
from align_cli.engine import Optimizer, TorchEngine, adamw
from align_cli.models import causal
from align_cli.sections import Train
from align_cli.tracking import read_metrics
from align_cli.train import NotFinite, WrongStart, learning_rate

ALGORITHMS = sorted(path.stem for path in paths.conf().glob("algo/*.yaml"))
LINKS = ("reverse_kl", "forward_kl", "js", "alpha", "hellinger", "forward_chi2", "jeffreys")  # what f-DPO can take
LOG2 = math.log(2)
# Before any update, on pairs or whatever K; the others' first values depend on the data or the weights.
FIRST = {
    "dpo": LOG2,
    "cdpo": LOG2,
    "robust_dpo": LOG2,
    "f_dpo": LOG2,
    "hinge": 1.0,
    "ipo": 1 / (4 * 0.1**2),
    "kto": 0.5,
    "nca": 2 * LOG2,
}
# An update of AdamW is lr·m/(√v + ε). With its usual ε of 1e-8 a coordinate without gradient moves by rounding alone,
# up to lr in a step; with ε = 1e-3 = lr a difference δ in the gradient moves a weight by at most about δ.
SMOOTH = ("optimizer.eps=1e-3", "algo.beta=0.1")


def needs(algorithm: str) -> list[str]:
    """The overrides without which an algorithm has no meaning on these rows."""
    if online(algorithm):
        sampled = ["source.samples=4", "source.max_new_tokens=6", "scorer=matches", "scorer.pattern='^[0-4]'"]
        return [f"algo={algorithm}", *sampled]
    return [f"algo={algorithm}", *(["divergence=js"] if algorithm == "f_dpo" else [])]


@pytest.fixture
def rows(ragged_file: Path, pairs_file: Path) -> Callable[[str], Path]:
    """Pairs for losses that compare two, else rows of different K."""
    comparing = [name for name in ALGORITHMS if "pairs" in signature(name)]

    def of(algorithm: str) -> Path:
        return pairs_file if algorithm in comparing else ragged_file

    return of


def signature(algorithm: str) -> list[str]:
    return columns.asked(config.find("align_cli.losses", algorithm, "algo"))


def online(algorithm: str) -> bool:
    """Whether it learns from its own samples; what it then does is in `test_rollouts.py`."""
    return bool({"behavior", "behavior_tokens"} & set(signature(algorithm)))


OFFLINE = [name for name in ALGORITHMS if not online(name) and "scores" not in signature(name)]


@pytest.mark.parametrize("algorithm", OFFLINE)
def test_every_algorithm_starts_at_its_exact_value_and_trains(
    algorithm: str, tiny_model: Path, rows: Callable[[str], Path], tmp_path: Path
) -> None:
    given = overrides(tiny_model, rows(algorithm), tmp_path / "run", *needs(algorithm))
    assert align("train", *given) == 0
    found = losses(tmp_path / "run")
    figures = summary(tmp_path / "run")
    assert len(found) == figures["steps"] == 20
    assert found[0] == figures["loss/first"] and found[-1] == figures["loss/last"]
    if algorithm in FIRST:
        assert found[0] == pytest.approx(FIRST[algorithm], rel=1e-6)
    assert sum(found[-5:]) < sum(found[:5])

    named = {"step", "loss", "learning_rate", "grad_norm", "epoch", "logps/chosen", "logps_per_token/chosen"}
    compares = algorithm != "sft"
    named |= {"logps/rejected"} if compares else set()
    if "reference" in signature(algorithm):
        named |= {f"rewards/{what}" for what in ("chosen", "rejected", "margins", "accuracies")}
        named |= {f"displacement/{what}" for what in ("chosen", "chosen_per_token", "rejected", "fraction_down")}
    for line in read_metrics(tmp_path / "run"):
        assert named <= line.keys()
    asked = {"groups_per_second", "tokens_per_second", "peak_memory_gb", "displacement/chosen"}
    asked |= {"displacement/fraction_down", "eval/before/loss", "eval/after/loss"}
    assert asked <= figures.keys()
    assert all(figures[name] > 0 for name in ("groups_per_second", "tokens_per_second", "peak_memory_gb"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_algorithm_skips_the_check_of_its_first_loss(
    algorithm: str, tiny_model: Path, rows: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "TOLERANCE", -1.0)
    given = overrides(tiny_model, rows(algorithm), tmp_path / "run", *needs(algorithm), "train.steps=1")
    with pytest.raises(WrongStart):
        cli.dispatch(["train", *given, "eval.groups=0"])


@pytest.mark.parametrize("divergence", LINKS)
def test_f_dpo_starts_at_log_2_under_every_divergence(
    divergence: str, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    given = overrides(tiny_model, pairs_file, tmp_path / "run", "algo=f_dpo", f"divergence={divergence}")
    assert align("train", *given, "train.steps=4") == 0
    assert losses(tmp_path / "run")[0] == pytest.approx(LOG2, rel=1e-6)


def test_f_dpo_under_reverse_kl_is_dpo(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    for name, chosen in (("dpo", ["algo=dpo"]), ("f_dpo", ["algo=f_dpo", "divergence=reverse_kl"])):
        assert align("train", *overrides(tiny_model, pairs_file, tmp_path / name, *chosen, "train.steps=5")) == 0
    assert losses(tmp_path / "dpo") == pytest.approx(losses(tmp_path / "f_dpo"), abs=1e-6)


def test_prompts_of_different_k_share_a_step(tiny_model: Path, ragged_file: Path, tmp_path: Path) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "algo=info_nca", "train.steps=1")
    assert align("train", *given) == 0
    store = run.prepare(small_runs.read(given)).train
    ks = [len(store[index].responses) for index in members(store, 1, prompts=4, seed=0, together=True).tolist()]
    assert set(ks) == {2, 4}
    # InfoNCA's value at the reference is log K
    assert losses(tmp_path / "run") == pytest.approx([np.log(ks).mean()], rel=1e-6)


def test_hard_labels_give_nca_on_pairs_its_gradient_and_keep_its_start(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    given = overrides(tiny_model, pairs_file, tmp_path / "run", "algo=nca", "reward=hard", "algo.beta=0.1")
    assert align("train", *given) == 0
    assert losses(tmp_path / "run")[0] == pytest.approx(2 * LOG2, rel=1e-6)
    assert read_metrics(tmp_path / "run")[-1]["rewards/margins"] > 0


@pytest.mark.parametrize("threshold, side", [(-1, "are above"), (0.5, None), (7, "are not above")])
def test_kto_says_where_all_rewards_are_on_one_side_of_its_threshold(
    threshold: float, side: str | None, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    given = overrides(tiny_model, pairs_file, tmp_path / "run", "algo=kto", f"algo.threshold={threshold}")
    run.prepare(small_runs.read(given), said.append)
    warned = [line for line in said if line.startswith("warning:")]
    assert bool(warned) == (side is not None) and all(f"{side} algo.threshold={threshold}" in line for line in warned)


def test_sft_averages_over_the_tokens_of_the_step(tiny_model: Path, ragged_file: Path, tmp_path: Path) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "algo=sft", "train.steps=1", "engine.micro_tokens=60")
    assert align("train", *given) == 0
    store = run.prepare(small_runs.read(given)).train
    groups = [store[index] for index in members(store, 1, prompts=4, seed=0, together=True).tolist()]
    nats = -sum(sum(small_runs.logprobs(tiny_model, group)) for group in groups)
    tokens = sum(len(response) for group in groups for response in group.responses)
    assert losses(tmp_path / "run") == pytest.approx([nats / tokens], abs=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_result_is_the_model_that_was_evaluated(
    adapter: str, tiny_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "algo.beta=0.1", f"adapter={adapter}")
    assert align("train", *given) == 0
    figures = summary(tmp_path / "run")
    held_out = list(run.prepare(small_runs.read(given)).held_out)
    moved: list[float] = []
    for group in held_out:
        best = int(group.ratings.argmax())
        after, before = (small_runs.logprobs(m, group)[best] for m in (tmp_path / "run" / "model", tiny_model))
        moved.append(after - before)
    # fp32 against float64 on sums of at most 30 tokens
    assert figures["displacement/chosen"] == pytest.approx(np.mean(moved), abs=1e-3)
    assert figures["displacement/fraction_down"] == pytest.approx(np.mean([m < 0 for m in moved]))
    logps = [figures[f"eval/{when}/logps/chosen"] for when in ("before", "after")]
    assert figures["displacement/chosen"] == pytest.approx(logps[1] - logps[0], abs=1e-4)
    assert abs(figures["displacement/chosen"]) > 0.05


@pytest.mark.parametrize("algorithm", ["nca", "kto", "sft", "dpo"])
def test_a_step_is_the_same_however_it_is_cut(
    algorithm: str, tiny_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    smooth = [one for one in SMOOTH if algorithm != "sft" or "beta" not in one]
    for budget in (1, 50, 100_000):
        given = overrides(tiny_model, ragged_file, tmp_path / str(budget), f"algo={algorithm}", "data.pairs=all")
        assert align("train", *given, *smooth, "train.steps=5", f"engine.micro_tokens={budget}") == 0
    whole, whole_losses = weights(tmp_path / "100000"), losses(tmp_path / "100000")
    for budget in (1, 50):
        assert losses(tmp_path / str(budget)) == pytest.approx(whole_losses, abs=1e-6)
        assert largest_difference(weights(tmp_path / str(budget)), whole) < 1e-6


def test_recomputed_activations_give_the_same_weights(tiny_model: Path, ragged_file: Path, tmp_path: Path) -> None:
    for name in ("false", "true"):
        given = overrides(tiny_model, ragged_file, tmp_path / name, *SMOOTH, "train.steps=5")
        assert align("train", *given, f"engine.gradient_checkpointing={name}") == 0
    # a weight near 1 that is rounded the other way is 2^-23 off; a loss of about 1 follows
    assert losses(tmp_path / "false") == pytest.approx(losses(tmp_path / "true"), abs=4 * 2**-23)
    assert largest_difference(weights(tmp_path / "false"), weights(tmp_path / "true")) <= 2 * 2**-23


def test_every_reference_is_made_of_the_same_figures(tiny_model: Path, ragged_file: Path, tmp_path: Path) -> None:
    kinds = ("cached", "frozen", "adapter")
    for kind in kinds:
        given = overrides(tiny_model, ragged_file, tmp_path / kind, *SMOOTH, "adapter=lora", "train.steps=5")
        assert align("train", *given, f"reference={kind}") == 0
    for kind in kinds[1:]:
        assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / "cached"), abs=1e-6)
        assert largest_difference(weights(tmp_path / kind), weights(tmp_path / "cached")) < 1e-6


def test_bf16_weights_move_through_fp32_masters(tiny_model: Path, ragged_file: Path, tmp_path: Path) -> None:
    # bf16 numbers just below 1 are 2^-8 apart, so that a step of 1e-3 from 1 rounds back to 1; ten in a row do not.
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "algo.beta=0.1", "engine.precision=bf16")
    given += ["train.lr=1e-3", "train.schedule=constant", "train.warmup_ratio=0", "train.steps=12", "eval.groups=0"]
    assert align("train", *given) == 0
    norm = weights(tmp_path / "run")["model.norm.weight"]
    assert norm.dtype == torch.bfloat16
    assert float((1 - norm.float()).max()) >= 2**-8


def test_bf16_gradients_of_several_micro_batches_are_summed_in_fp32() -> None:
    network: Any = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    options = Optimizer(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.0, max_grad_norm=None)
    engine = TorchEngine(network, torch.device("cpu"), manner=causal.Manner(flat=True), optimizer=options)
    # bf16 has 8 bits: 256 + 1 is 256 there
    for slopes in ([256.0], [256.0, 1.0, 1.0], [1.0]):
        for slope in slopes:
            engine.backward(slope * network(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
        assert float(engine.step(0.0)) == sum(slopes)


@pytest.mark.parametrize("every", [1, 3])
def test_evaluation_is_logged_where_it_is_asked_for(
    every: int, tiny_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "train.steps=7", "eval.every=3")
    assert align("train", *given, f"track.every={every}") == 0
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6]
    assert [line["step"] for line in lines if "loss" in line] == ([1, 3, 6, 7] if every == 3 else list(range(1, 8)))
    assert {"eval/rewards/margins", "eval/displacement/chosen"} <= next(x for x in lines if x["step"] == 3).keys()


# --- wrong starts and bad ends


@pytest.mark.parametrize(
    "right, figures, precise",
    [
        (True, {"plain": 0.99}, False),  # rounding of padded sequences, apart from that of flat rows
        (False, {"plain": 0.94}, False),
        (False, {"plain": 0.99}, True),
        (True, {"plain": 0.9995}, True),
        (False, {"exact": 0.99}, False),  # the scores of a fresh reward model are 0, not 0 but for rounding
        (False, {"exact": 0.99, "start": 1.0, "drift": 0.01}, False),
        (True, {"exact": 0.99, "start": 0.99, "drift": 0.01}, False),  # a steep loss multiplies the drift
        (False, {"exact": 0.99, "start": 0.99, "drift": 0.06}, False),
        (True, {"loss": 2502.0, "exact": 2500.0}, True),  # a small β or α makes a loss large, and its rounding
        (False, {"loss": 2503.0, "exact": 2500.0}, True),
        (False, {"loss": 2502.0, "plain": 2500.0}, True),
    ],
)
def test_a_first_loss_is_held_to_rounding_where_it_is_measured_twice(
    right: bool, figures: dict[str, float], precise: bool
) -> None:
    with nullcontext() if right else pytest.raises(WrongStart, match="the first loss is"):
        train._judge(1, {"loss": 1.0, **figures}, precise)


def test_a_reference_of_other_weights_is_noticed(
    tiny_model: Path, ragged_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run, "weights_digest", lambda path, commit: "one-digest-for-all")
    assert references.weights_digest(str(tiny_model), None) != "one-digest-for-all"
    other = small_runs.build_model(tmp_path / "other", seed=1)
    settings = ("algo.beta=0.1", "train.steps=1")
    assert align("train", *overrides(other, ragged_file, tmp_path / "first", *settings)) == 0
    with pytest.raises(WrongStart, match="the reference is not the policy's starting weights"):
        cli.dispatch(["train", *overrides(tiny_model, ragged_file, tmp_path / "second", *settings)])
    assert not (tmp_path / "second" / "summary.json").exists()
    assert not (tmp_path / "second" / "model").exists()


@pytest.mark.parametrize("algorithm", ["nca", "sft", "orpo"])  # with a reference, and held to the plain way
def test_a_random_part_is_noticed(
    algorithm: str, tiny_model: Path, rows: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = assembly._network

    def shaken(*given: Any) -> Any:
        network: Any = plain(*given)
        network.model.layers[0].mlp.register_forward_hook(
            lambda module, inputs, output: nn.functional.dropout(output, 0.5, module.training)
        )
        return network

    monkeypatch.setattr(assembly, "_network", shaken)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(WrongStart, match="dropout or another random part is active"):
        cli.dispatch(["train", *overrides(tiny_model, rows(algorithm), tmp_path / "run", *needs(algorithm))])


def test_the_dropout_of_a_model_is_silenced(tiny_model: Path) -> None:
    model = causal.Model(name="hf", path=str(tiny_model), revision=None, rows="auto", head="auto", architecture=None)
    network = causal.load_model(model, dtype=torch.float32, bits=None)
    network.model.layers[0].extra = nn.Dropout(0.3)  # pyright: ignore
    causal.silence_dropout(network)
    assert network.model.layers[0].extra.p == 0.0  # pyright: ignore


def test_a_loss_that_is_no_number_stops_the_run(tiny_model: Path, ragged_file: Path, tmp_path: Path) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "train.lr=1e30", "checkpoint.every=1")
    with pytest.raises(NotFinite, match=r"step \d+ is (nan|not finite).*engine.precision=fp32"):
        cli.dispatch(["train", *given])
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_gradient_that_is_no_number_is_never_saved(
    tiny_model: Path, ragged_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TorchEngine.backward
    calls: list[int] = []

    def broken(self: TorchEngine, loss: Tensor) -> None:
        whole(self, loss)
        calls.append(1)
        if len(calls) == 3:
            first = next(iter(self.parameters.values()))
            first.grad = torch.full_like(first, math.inf)

    monkeypatch.setattr(TorchEngine, "backward", broken)
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "checkpoint.every=1", "track.every=100")
    given += ["engine.micro_tokens=100000", "data.responses=2"]
    with pytest.raises(NotFinite, match="the gradient of step 3 is not finite"):
        cli.dispatch(["train", *given])
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000001", "step_00000002"]


# --- the optimizer


def options(schedule: str, warmup: float) -> Train:
    told = {"steps": None, "epochs": 1, "prompts": 1, "together": True, "lr": 0.5}
    return Train(**told, schedule=schedule, warmup_ratio=warmup)  # pyright: ignore


def test_the_learning_rate_rises_and_falls_as_its_schedule_says() -> None:
    rise = [0.125, 0.25, 0.375, 0.5]
    linear = [learning_rate(step, 20, options("linear", 0.2)) for step in range(1, 21)]
    assert linear == pytest.approx(rise + [0.5 * left / 16 for left in range(16, 0, -1)])
    cosine = [learning_rate(step, 20, options("cosine", 0.2)) for step in range(1, 21)]
    assert cosine[:4] == pytest.approx(rise)
    assert cosine[4:] == pytest.approx([0.25 * (1 + math.cos(math.pi * done / 16)) for done in range(16)])
    constant = [learning_rate(step, 20, options("constant", 0.2)) for step in range(1, 21)]
    assert constant == pytest.approx(rise + [0.5] * 16)


def test_a_warm_up_may_last_no_step_or_all_steps() -> None:
    assert [learning_rate(step, 3, options("constant", 0.0)) for step in (1, 2, 3)] == [0.5, 0.5, 0.5]
    assert [learning_rate(step, 2, options("cosine", 1.0)) for step in (1, 2)] == [0.25, 0.5]
    assert learning_rate(1, 1, options("cosine", 0.1)) == 0.5


def test_the_logged_learning_rates_are_those_of_the_schedule(
    tiny_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "train.steps=8", "train.warmup_ratio=0.25")
    assert align("train", *given) == 0
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run")]
    expected = [5e-4, 1e-3, *(5e-4 * (1 + math.cos(math.pi * done / 6)) for done in range(6))]
    assert rates == pytest.approx(expected)


def test_norms_and_biases_are_not_decayed() -> None:
    network = nn.Sequential()
    network.add_module("proj", nn.Linear(3, 3))
    network.add_module("input_layernorm", nn.LayerNorm(3))
    network.add_module("ln_f", nn.LayerNorm(3))
    network.add_module("embed", nn.Embedding(5, 3))
    nn.init.ones_(network.proj.bias)  # pyright: ignore
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    chosen = Optimizer(betas=[0.9, 0.999], eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
    optimizer = adamw(dict(network.named_parameters()), chosen)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # without a gradient, AdamW multiplies what it decays by 1 − lr · decay and leaves the rest
    for name, parameter in network.named_parameters():
        factor = 0.95 if name in ("proj.weight", "embed.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])


def test_the_first_update_is_adamw_with_the_clipped_gradient(
    tiny_model: Path, ragged_file: Path, tmp_path: Path
) -> None:
    given = overrides(tiny_model, ragged_file, tmp_path / "run", "algo.beta=0.1", "train.steps=1", "optimizer.eps=1.0")
    given += ["train.lr=1.0", "train.schedule=constant", "train.warmup_ratio=0", "optimizer.max_grad_norm=0.01"]
    assert align("train", *given, "eval.groups=0") == 0
    (line,) = read_metrics(tmp_path / "run")
    assert line["grad_norm"] > 0.01
    start, end = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "run" / "model"))
    # ε = 1 makes the first update lr · g/(|g| + 1), and |g| <= 0.01 makes that g within 1 %
    moved = math.sqrt(sum(float((end[name] - start[name]).double().square().sum()) for name in start))
    assert moved == pytest.approx(0.01, rel=0.011)


@pytest.mark.parametrize("seed", range(4))
def test_rounding_to_bf16_stops_no_right_start(seed: int, tiny_model: Path, ragged_file: Path, tmp_path: Path) -> None:
    """IPO at a small β is steep: log-ratios that rounding puts apart by 0.001 change it by 0.01."""
    settings = ("algo=ipo", "data.pairs=best_worst", "algo.beta=0.02", "engine.precision=bf16", f"run.seed={seed}")
    given = overrides(tiny_model, ragged_file, tmp_path / "run", *settings, "train.steps=2", "train.prompts=2")
    assert align("train", *given) == 0
