"""The benchmark's own arithmetic: lengths, operations, ratios, the form of its JSON, the table and the picture.

Nothing is timed and TRL does not run here.
"""

import copy
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from benchmark import __main__ as bench
from benchmark import (
    contenders,
    evaluation,
    floor,
    flops,
    gate,
    groups,
    online,
    parts,
    picture,
    plan,
    processes,
    results,
    sampling,
    shapes,
    table,
    tokens,
)
from benchmark.lengths import TABLES, Lengths, Table, draw, fixed
from benchmark.plan import ALIGN, SHIPPED, TUNED, UNSHARED, Case
from benchmark.processes import Ended
from benchmark.shapes import SHAPES, Shape

SMALL = Shape("tiny", 8, 2, 2, 1, 12, 40, "a test")
TABLED = ("full", "30M", "135M")  # the benchmarks whose tables README shows


@pytest.mark.parametrize("responses", [2, 4])
@pytest.mark.parametrize("name", TABLES)
def test_lengths_have_the_stated_means_after_the_cut(name: str, responses: int) -> None:
    kind = TABLES[name]
    for count in (4, 8, 4096):
        lengths = draw(kind, groups=count, responses=responses, seed=3)
        assert lengths.prompts.mean() == pytest.approx(kind.prompt, abs=0.5)
        assert lengths.responses.mean() == pytest.approx(kind.response, abs=0.5)
        assert lengths.prompts.max() <= kind.prompt_cut
        assert (lengths.prompts[:, None] + lengths.responses).max() <= kind.total_cut
        assert min(lengths.prompts.min(), lengths.responses.min()) >= 2


def test_lengths_depend_on_the_seed_alone() -> None:
    kind = TABLES["UltraFeedback-like"]
    one, same, other = (draw(kind, groups=6, responses=3, seed=seed) for seed in (0, 0, 1))
    assert one.as_json() == same.as_json()
    assert one.as_json() != other.as_json()
    assert sorted(one.prompts) == sorted(other.prompts)  # the same quantiles in another order


def test_a_cut_that_leaves_no_room_for_the_mean_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prompts have a mean of 30\.0 tokens"):
        draw(Table("short of room", 50, 10, 1.0, 1.0, 30, 100, ""), groups=8, responses=2, seed=0)


def test_the_token_ratio_is_that_of_the_formula() -> None:
    lengths = Lengths(np.array([10, 10]), np.array([[4, 6, 5], [5, 5, 5]]))
    assert lengths.logical().tolist() == [45, 45]
    assert lengths.unique().tolist() == [25, 25]
    assert lengths.token_ratio() == 3 * (10 + 5) / (10 + 3 * 5)
    assert lengths.means() == {"prompt": 10, "response": 5, "group": 45}


def test_padding_is_the_longest_row_times_the_rows() -> None:
    lengths = Lengths(np.array([2, 4]), np.array([[2, 4], [1, 1]]))
    assert lengths.logical().sum() == 20
    assert lengths.padding(1) == (2 * 6 + 2 * 5) / 20
    assert lengths.padding(2) == 4 * 6 / 20
    assert lengths.padding(8) == lengths.padding(2)


def test_operations_are_those_of_the_formula() -> None:
    lengths = Lengths(np.array([3]), np.array([[2, 1]]))
    # per layer: q and o 8x8, k and v 4x8, three matrices of the feed-forward 8x12
    weights = 2 * (2 * 64 + 2 * 32 + 3 * 96)
    assert SMALL.matrix_weights == weights
    pairs = 3 * 4 / 2 + (2 * 3 + 2 * 3 / 2) + (1 * 3 + 1)
    expected = 6 * weights * 6 + 12 * 2 * 8 * pairs + 6 * 40 * 8 * 3
    assert flops.group_flops(SMALL, lengths).tolist() == [expected]
    # each response with its prompt, as two groups of one response
    apart = [Lengths(np.array([3]), np.array([[each]])) for each in (2, 1)]
    copies = sum(float(flops.group_flops(SMALL, each)[0]) for each in apart)
    assert flops.group_flops(SMALL, lengths, shared=False).tolist() == [copies]


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_counts_the_weights_of_its_model(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    shape = SHAPES[name]
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert sum(weight.numel() for weight in model.parameters()) == shape.weights
    linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(module.weight.numel() for module in linear) == shape.matrix_weights
    counted = [(rows, columns) for rows, columns, times in flops.matrices(shape).values() for _ in range(times)]
    head = (shape.vocabulary, shape.hidden)
    assert sorted(counted) == sorted([tuple(module.weight.shape) for module in linear] + [head])


def test_the_weighted_rate_is_work_over_time() -> None:
    rates = dict.fromkeys(flops.matrices(SMALL), 7.0)
    assert flops.weighted_rate(rates, SMALL, response_share=0.5) == pytest.approx(7.0)
    slow = rates | {"head": 3.5}
    head, rest = 40 * 8 * 0.5, SMALL.matrix_weights
    assert flops.weighted_rate(slow, SMALL, response_share=0.5) == pytest.approx(
        (head + rest) / (head / 3.5 + rest / 7)
    )


def test_the_floor_is_each_part_of_the_work_at_its_own_rate() -> None:
    """A prompt of 3 tokens, responses of 2 and 1, in steps of one group: counted one by one."""
    lengths = Lengths(np.array([3]), np.array([[2, 1]]))
    told = {
        "lengths": "here",
        "groups_per_step": 1,
        "unique_tokens_per_group": 6.0,
        "response_tokens_per_group": 3.0,
        "flops_per_group": float(flops.group_flops(SMALL, lengths)[0]),
    }
    seen = (1 + 2 + 3) + (4 + 5) + 4  # keys of each query: of the prompt, of one response, of the other
    rates = {"attention": {"here": math.inf}, "exponentials": math.inf, "AdamW": math.inf}
    matrices = 6 * SMALL.matrix_weights * 6 + 6 * SMALL.vocabulary * SMALL.hidden * 3
    assert floor.seconds_per_group(told, SMALL, rates, 2.0) == matrices / 2
    attention = {**rates, "attention": {"here": 4.0}}
    per_pair = 12 * SMALL.layers * SMALL.heads * SMALL.head_width
    assert floor.seconds_per_group(told, SMALL, attention, math.inf) == pytest.approx(per_pair * seen / 4)
    exponentials = SMALL.layers * SMALL.heads * seen + SMALL.vocabulary * 3
    found = floor.seconds_per_group(told, SMALL, {**rates, "exponentials": 8.0}, math.inf)
    assert found == pytest.approx(exponentials / 8)
    weights = {**rates, "AdamW": 16.0}
    assert floor.seconds_per_group(told, SMALL, weights, math.inf) == SMALL.weights / 16
    assert floor.seconds_per_group({**told, "groups_per_step": 4}, SMALL, weights, math.inf) == SMALL.weights / 64


def test_what_bounds_a_step_can_be_measured() -> None:
    found = floor.measure(SMALL, seconds=0.0)
    assert set(found) == {"attention", "exponentials", "AdamW"} and set(found["attention"]) == set(TABLES)
    assert all(0 < rate < math.inf for rate in (*found["attention"].values(), found["exponentials"], found["AdamW"]))


def case(**changed: Any) -> Case:
    settings: dict[str, Any] = {
        "part": "target",
        "shape": SHAPES["tiny"],
        "table": fixed(9, 7),
        "responses": 2,
        "groups": 3,
        "timed": 2,
        "contenders": (ALIGN, TUNED),
        "repeats": 2,
        "warm": 1,
    }
    return Case(**(settings | changed))


def test_a_trainer_that_reads_in_its_order_meets_the_groups_in_ours() -> None:
    written = groups.fill(bench.lengths_of(case()), vocabulary=100, seed=0)
    order = bench.epoch_order(len(written))
    rows = groups.placed(written, order)
    assert [id(rows[place]) for place in order] == [id(group) for group in written]


@pytest.mark.parametrize("responses", [1, 2, 4])
def test_align_reads_the_token_ids_that_were_written(responses: int, tmp_path: Path) -> None:
    shape = SHAPES["tiny"]
    one = case(responses=responses)
    written = groups.fill(bench.lengths_of(one), vocabulary=shape.vocabulary, seed=0)
    rows = groups.write_rows(groups.placed(written, bench.epoch_order(one.rows)), tmp_path / "rows.jsonl")
    model = shapes.write_model(shape, tmp_path / "model", seed=0)
    command = contenders.align_command(one, ALIGN, model=model, rows=rows, run_dir=tmp_path / "run", more=())
    assert tokens.digest(command[2:], cache=tmp_path / "cache", steps=one.steps) == groups.digest_of(written)


def test_a_changed_setting_takes_the_place_of_the_first() -> None:
    more = ("engine.precision=fp32", "algo.beta=1.0")
    command = contenders.align_command(case(), UNSHARED, model=Path("m"), rows=Path("r"), run_dir=Path("d"), more=more)
    assert "engine.precision=bf16" not in command
    assert [word for word in command if word.startswith(("engine.", "algo.beta", "model.rows"))] == [
        "algo.beta=1.0",
        "engine.precision=fp32",
        "model.rows=packed",
    ]


def test_every_step_has_the_means_and_the_lengths_of_all_others() -> None:
    one = case(table=TABLES["UltraFeedback-like"], groups=4, timed=2)
    lengths = bench.lengths_of(one)
    assert len(lengths.prompts) == one.rows == 12
    assert lengths.responses.shape == (12, 2)
    for place in range(0, 12, 4):
        means = lengths[slice(place, place + 4)].means()
        assert (means["prompt"], means["response"]) == (pytest.approx(185, abs=0.5), pytest.approx(305, abs=0.5))
        assert lengths[slice(place, place + 4)].as_json() == lengths[slice(4)].as_json()


def test_every_plan_has_names_of_its_own_and_ways_to_run_them() -> None:
    for cases in (plan.full(5), plan.quick(2), plan.smoke(1)):
        names = [one.name for one in cases]
        assert len(set(names)) == len(names)
        known = {SHIPPED, TUNED, *plan.OVERRIDES}
        assert {contender for one in cases for contender in one.contenders} <= known
        assert all(one.groups % min(8, one.groups) == 0 for one in cases)
    compared = {(c.table.name, c.responses, other) for c in plan.full(5) for other in c.contenders}
    assert {(t.table, t.responses, t.against) for t in plan.TARGETS} <= compared
    assert {c.x for c in plan.full(5) if c.part == "K"} == set(range(1, 9))
    assert [c.rows for c in plan.full(5) if c.part == "dataset"] == [1024, 4096, 16384, 65536]


def test_steps_are_read_off_the_lines_of_either_side() -> None:
    lines = [
        (0.5, "12 optimizer steps of 4 prompts (136 tokens), 12 prompts in all"),
        (1.0, "step 1/3  loss 0.6931  8,299 tokens/s"),
        (2.5, " 67%|######7   | 2/3 [00:00<00:00, 16.60it/s]step 2/3"),
        (4.0, "step 3/3"),
    ]
    ended = Ended(code=0, lines=lines, seconds=5.0, peak_bytes=7, load=0.0, others=0.0)
    assert contenders.step_ends(ended, 3) == [1.0, 2.5, 4.0]
    record = contenders.record_of(case(timed=2), ended, {"threads": 2})
    assert (record["first_step"], record["step_seconds"]) == (1.0, [1.5, 1.5])
    cut = replace(ended, lines=lines[:-1])
    with pytest.raises(ValueError, match="2 of 3 steps"):
        contenders.step_ends(cut, 3)


def test_a_process_is_watched_from_outside(tmp_path: Path) -> None:
    script = "import time; print('a', flush=True); time.sleep(2); x = bytearray(200 << 20); print('b'); exit(3)"
    command = [sys.executable, "-c", script]
    ended = processes.run(command, environment={"PATH": "/usr/bin:/bin"}, folder=tmp_path, limit=300)
    assert (ended.code, [line for _, line in ended.lines]) == (3, ["a", "b"])
    (one, _), (other, _) = ended.lines
    assert other - one > 0.25
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert 200 << 20 < ended.peak_bytes < own + (300 << 20)
    assert 0 <= ended.others <= 1


def test_a_process_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    ended = processes.run(["sleep", "60"], environment={"PATH": "/usr/bin:/bin"}, folder=tmp_path, limit=0.3)
    assert ended.code == -9
    assert ended.seconds < 10


def run(contender: str, number: int, steps: list[float], *, peak: float = 1.0, **more: Any) -> dict[str, Any]:
    record = {
        "case": case().name,
        "contender": contender,
        "round": number,
        "attempt": 0,
        "void": False,
        "disturbed": False,
        "code": 0,
        "seconds": 9.0,
        "load": 0.1,
        "others": 0.01,
        "peak_bytes": peak * 1e9,
        "first_step": 4.0,
        "step_seconds": steps,
        "reference_seconds": 1.8,
    }
    return record | more


def benchmark_of(*runs: dict[str, Any], cases: tuple[Case, ...] = (case(),)) -> dict[str, Any]:
    """What a benchmark of these runs would have written."""
    data: dict[str, Any] = {
        "format": results.FORMAT,
        "name": "test",
        "git": "0" * 40,
        "tree": "1" * 16,
        "started": "2026-01-02T03:04:05+0000",
        "finished": None,
        "machine": {"processor": "a processor", "cpus": 2, "memory_gb": 24.0},
        "versions": {"torch": "2", "transformers": "5", "trl": "1"},
        "settings": {
            "threads": 2,
            "cases": {one.name: results.case_settings(one, bench.lengths_of(one)) for one in cases},
        },
        "gate": {},
        "gemm": {"weighted": {"tiny": {"bf16": 1e9}}},
        "sweeps": {},
        "runs": list(runs),
        "figures": {},
    }
    data["figures"] = results.figures(data)
    return data


def test_ratios_are_of_neighbours_and_medians_are_of_rounds() -> None:
    data = benchmark_of(
        run(ALIGN, 0, [1.0, 3.0], peak=1.0),
        run(TUNED, 0, [8.0, 8.0], peak=4.0),
        run(TUNED, 1, [30.0, 30.0], peak=2.0),
        run(ALIGN, 1, [3.0, 3.0], peak=1.0),
        run(ALIGN, 2, [5.0, 5.0]),  # without a neighbour
        run(TUNED, 2, [1.0, 1.0], void=True),
    )
    told = results.ratios(data, case().name, TUNED)
    assert told is not None
    # round 0: 3 groups in the median of 1 and 3 seconds against 8; round 1: 3 seconds against 30
    assert told["speed"] == {"median": 7.0, "min": 4.0, "max": 10.0, "rounds": 2}
    assert told["memory"] == {"median": 0.375, "min": 0.25, "max": 0.5, "rounds": 2}
    found = data["figures"]["cases"][case().name][ALIGN]
    assert found["groups_per_second"] == {"median": 1.0, "min": 0.6, "max": 1.5, "rounds": 3}
    # 1.8 seconds for the tokens of the warm and the timed groups, beside a second for a group in training
    settings = data["settings"]["cases"][case().name]
    lengths = bench.lengths_of(case()).unique()
    each = 1.8 * lengths[3:].mean() / lengths.sum()
    assert settings["share_of_pass"] == pytest.approx(each / 1.8)
    assert found["groups_per_second_with_reference"]["1 epoch"] == pytest.approx(1 / (1 + each))
    assert found["groups_per_second_with_reference"]["3 epochs"] == pytest.approx(1 / (1 + each / 3))
    work = data["settings"]["cases"][case().name]["flops_per_group"]
    assert found["share_of_gemm_rate"]["bf16"] == pytest.approx(work / 1e9)


def test_warm_steps_are_thrown_away() -> None:
    one = case(warm=2, timed=2)
    settings = results.case_settings(one, bench.lengths_of(one))
    # of four steps three differences are known; the first of them is the second warm step
    assert results.timed({"step_seconds": [9.0, 1.0, 2.0]}, settings) == [1.0, 2.0]


def test_a_target_is_reached_by_speed_and_memory_together() -> None:
    lengths = TABLES["UltraFeedback-like"]
    one = case(table=lengths, contenders=(ALIGN, TUNED, UNSHARED))

    def reached(speed: float, memory: float) -> dict[str, bool]:
        runs = (
            run(ALIGN, 0, [1.0, 1.0], peak=memory, case=one.name),
            run(TUNED, 0, [speed, speed], case=one.name),
            run(UNSHARED, 0, [speed, speed], case=one.name),
        )
        return {row["against"]: row["reached"] for row in benchmark_of(*runs, cases=(one,))["figures"]["targets"]}

    assert reached(6.1, 0.4) == {TUNED: True, UNSHARED: True}
    assert reached(5.9, 0.4) == {TUNED: False, UNSHARED: True}
    assert reached(6.1, 0.6) == {TUNED: False, UNSHARED: True}
    ratio = bench.lengths_of(one)[one.groups :].token_ratio()
    assert reached(0.91 * ratio, 0.4)[UNSHARED]
    assert not reached(0.89 * ratio, 0.4)[UNSHARED]


def test_the_slope_of_a_linear_cost_is_one() -> None:
    assert results.slope([(2.0, 10.0), (4.0, 20.0), (16.0, 80.0)]) == pytest.approx(1.0)
    assert results.slope([(2.0, 4.0), (4.0, 16.0), (8.0, 64.0)]) == pytest.approx(2.0)


def test_the_form_of_the_json_is_checked() -> None:
    data = benchmark_of(run(ALIGN, 0, [1.0, 1.0]), run(TUNED, 0, [5.0, 6.0]))
    assert results.check(json.loads(json.dumps(data))) == []
    assert set(data) == set(results.SECTIONS)
    less = {name: value for name, value in data.items() if name != "gate"}
    assert results.check(less) == ["gate is missing"]
    assert results.check(data | {"format": 0}) == ["format 0, this is 1"]
    broken = copy.deepcopy(data)
    del broken["runs"][0]["peak_bytes"]
    broken["runs"][1] |= {"step_seconds": [], "case": "no such"}
    assert results.check(broken) == [
        "runs[0] has no peak_bytes",
        "runs[1] has no step times",
        "runs[1] is of a case that settings.cases does not name",
    ]


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    data = benchmark_of(run(ALIGN, 0, [1.0, 1.0]))
    results.write(tmp_path / "test.json", data)
    assert results.read(tmp_path / "test.json") == json.loads(json.dumps(data))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="format is missing"):
        results.read(tmp_path / "other.json")


def test_the_gate_asks_for_losses_that_move_and_agree_and_for_one_direction() -> None:
    fine = gate.judge([0.6931, 0.70, 0.68], [0.6931, 0.70004, 0.68], 0.999999)
    assert fine["passed"]
    assert fine["largest_difference"] == pytest.approx(4e-5)
    assert not gate.judge([0.6931, 0.70, 0.68], [0.6931, 0.7002, 0.68], 0.999999)["passed"]
    assert not gate.judge([0.6931, 0.70, 0.68], [0.6931, 0.70, 0.68], 0.99998)["passed"]
    assert not gate.judge([0.6931, 0.6931, 0.6931], [0.6931, 0.6931, 0.6931], 1.0)["passed"]
    assert not gate.judge([0.6931, 0.6934, 0.6932], [0.6931, 0.69346, 0.6932], 1.0)["passed"]  # a fifth of the way
    assert not gate.judge([0.6931, float("nan"), 0.6], [0.6931, 0.7, 0.6], 1.0)["passed"]


def test_the_cosine_is_over_all_weights_at_once() -> None:
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    other = {"a": torch.tensor([0.3, 0.0]), "b": torch.tensor([[0.4]])}
    assert gate.cosine_of(one, other) == pytest.approx(1.0)
    assert gate.cosine_of(one, other | {"b": torch.tensor([[-0.4]])}) == pytest.approx((9 - 16) / 25)
    with pytest.raises(gate.Disagreement, match="different weights"):
        gate.cosine_of(one, {"a": one["a"]})


def test_the_readme_gets_the_table_between_its_marks(tmp_path: Path) -> None:
    one = case(table=TABLES["UltraFeedback-like"])
    data = benchmark_of(
        run(ALIGN, 0, [1.0, 1.0], case=one.name), run(TUNED, 0, [5.0, 6.0], case=one.name), cases=(one,)
    )
    readme = tmp_path / "README.md"
    begin, end = table.marks("test")
    readme.write_text(f"before\n\n{begin}\nold\n{end}\n\nafter\n")
    table.write_readme(readme, data)
    table.write_readme(readme, data)  # twice is once
    told = readme.read_text()
    assert told.startswith(f"before\n\n{begin}\n") and told.endswith(f"{end}\n\nafter\n")
    assert "old" not in told
    assert told.count("| tiny | TRL tuned | UltraFeedback-like | 2 | **5.50** (5.50 to 5.50) | ≥ 6 |") == 1
    assert "svg" not in told  # a picture of the same ratios would say no more
    curve = case(part="K", contenders=(ALIGN,))
    more = [run(ALIGN, 0, [1.0, 1.0], case=curve.name)]
    table.write_readme(readme, benchmark_of(*data["runs"], *more, cases=(one, curve)))
    assert readme.read_text().count("(scripts/benchmark/results/test.svg)") == 1
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="has no"):
        table.write_readme(readme, data)


def test_a_disturbed_run_that_was_kept_is_said_under_the_table() -> None:
    data = benchmark_of(run(ALIGN, 0, [1.0, 1.0], disturbed=True))
    assert "1 runs were taken while other processes were at work" in "\n".join(table.lines(data))


@pytest.mark.parametrize("name", TABLED)
def test_the_project_readme_has_a_place_for_each_table(name: str) -> None:
    told = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    begin, end = table.marks(name)
    assert told.count(begin) == told.count(end) == 1
    assert told.index(begin) < told.index(end)


def test_what_the_readme_says_in_short_is_the_range_of_its_tables() -> None:
    told = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [row for name in TABLED for row in results.read(bench.RESULTS / f"{name}.json")["figures"]["targets"]]
    speeds = {who: [row["speed"]["median"] for row in rows if row["against"] == who] for who in (SHIPPED, TUNED)}
    memory = [row["memory"]["median"] for row in rows if row["against"] in speeds]
    shipped, tuned = (f"{min(found):.1f} to {max(found):.1f} times" for found in speeds.values())
    short = f"In short: {shipped} the groups per second of TRL as shipped and {tuned} those of TRL tuned, in "
    assert f"{short}{min(memory):.2f} to {max(memory):.2f} of its memory" in " ".join(told.split())


def test_the_readme_s_table_of_sharing_is_what_was_measured() -> None:
    told = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").partition("What sharing prompts")[2]
    rows = [
        line.strip("| ").split(" | ") for line in told.splitlines() if re.match(r"\| [\w-]+[ \w-]* \| [24] \|", line)
    ]
    assert len(rows) == 6
    found = json.loads((bench.RESULTS / "parts.json").read_text(encoding="utf-8"))["figures"]
    for lengths, responses, ratio_of_tokens, *of_models in rows:
        for model, (ratio, operations) in zip(("30M", "135M"), (of_models[:2], of_models[2:]), strict=True):
            case = found[f"{model}, {lengths}, K = {responses} [sharing]"]
            means = [case["token_ratio"], case["ratio"]["median"], case["operation_ratio"]]
            assert [ratio_of_tokens, ratio, operations] == [f"{mean:.2f}" for mean in means]


def test_the_script_shows_what_was_measured(tmp_path: Path) -> None:
    """The README's lines, on what is in their JSON already; its table is the one that they write."""
    root = Path(__file__).parents[1]
    shutil.copytree(root / "scripts", tmp_path / "scripts")
    measured = tmp_path / "scripts" / "benchmark" / "results"
    shutil.copy(measured / "full.json", measured / "quick.json")
    told = emptied = (root / "README.md").read_text(encoding="utf-8")
    for name in TABLED:
        begin, end = table.marks(name)
        before, _, rest = emptied.partition(begin)
        emptied = before + begin + "\n" + end + rest.partition(end)[2]
    lines = re.findall(r"^ {4}(scripts/bench\b.*?)(?: {3,}.*)?$", told, re.MULTILINE)
    assert len(lines) == 4 + len(TABLED)
    readme = tmp_path / "README.md"
    readme.write_text(emptied, encoding="utf-8")
    for line in lines:
        before = readme.read_text(encoding="utf-8")
        environment = os.environ | {"BENCH_PYTHON": sys.executable}
        subprocess.run([*line.split(), "--show"], cwd=tmp_path, env=environment, check=True)
        assert (readme.read_text(encoding="utf-8") != before) == ("--readme" in line), line
    assert readme.read_text(encoding="utf-8") == told


def test_a_rate_of_products_stays_the_one_that_was_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    before = torch.get_float32_matmul_precision()
    rates = flops.measure_rates([], tokens=4, seconds=0.0, square=8)
    torch.set_float32_matmul_precision(before)

    def measured(module: str, job: dict[str, Any]) -> dict[str, Any]:
        if module == "benchmark.floor":
            return {name: {"of": len(asked)} for name in job["shapes"]}
        asked.append(job["shapes"])
        now = dict.fromkeys([*job["shapes"], "square"], float(len(asked)))
        return {name: now if isinstance(found, dict) else found for name, found in rates.items()}

    monkeypatch.setattr(bench.contenders, "ask", measured)
    monkeypatch.setattr(bench.flops, "weighted_rate", lambda rates, shape, response_share: rates)
    made = bench.Bench(tmp_path / "full.json", plan.full(1), fresh=True, accept_load=True)
    every = made.cases
    for part in ("135M", "30M", "tiny", ""):
        made.cases = [each for each in every if part in each.name]
        made.measure_products(brief=True)
    assert asked == [["135M"], ["30M"], ["tiny"]]
    assert {name: rate["bf16"] for name, rate in made.data["gemm"]["weighted"].items()} == {
        "135M": 1.0,
        "30M": 2.0,
        "tiny": 3.0,
    }
    assert made.data["gemm"]["rates"]["bf16"] == {"135M": 1.0, "30M": 2.0, "tiny": 3.0, "square": 1.0}
    assert made.data["gemm"]["rates"]["tokens"] == 4
    assert made.data["gemm"]["floor"] == {"135M": {"of": 1}, "30M": {"of": 2}, "tiny": {"of": 3}}


def test_committed_results_are_whole_and_their_figures_follow_from_their_runs() -> None:
    for path in bench.RESULTS.glob("*.json"):
        data = results.read(path)
        of = {"evaluation": evaluation.figures, "online": online.figures, "parts": parts.figures}
        figures = of.get(data["name"], results.figures)
        assert json.loads(json.dumps(figures(data))) == data["figures"], path


def test_steps_of_both_kinds_and_their_parts_are_timed(tmp_path: Path) -> None:
    one = Case("sharing", SHAPES["tiny"], fixed(200, 60), 3, 2, 1, (ALIGN, UNSHARED), 1)
    lengths = bench.lengths_of(one)[:2]
    shapes.write_model(one.shape, tmp_path, seed=0)
    job = {"shape": one.shape.name, "folder": str(tmp_path), "pairs": 2, "round": 0}
    found = parts.measured(job | lengths.as_json())
    assert found["token_ratio"] == lengths.token_ratio()
    # what is shared or not differs by less than the tokens do
    assert 1 < found["operation_ratio"] < found["token_ratio"]
    assert found["tokens"] == {ALIGN: lengths.unique().sum(), UNSHARED: lengths.logical().sum()}
    for kind in (ALIGN, UNSHARED):
        assert len(found["seconds"][kind]) == 2
        assert found["parts"][kind].keys() == set(parts.PARTS) - {"rest"}
        assert all(seconds >= 0 for seconds in found["parts"][kind].values())
        assert all(found["parts"][kind][part] > 0 for part in ("blocks", "attention", "head"))


def test_a_measurement_of_sharing_goes_on_and_adds_to_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def ask(_: str, job: dict[str, Any]) -> dict[str, Any]:
        asked.append(job["round"])
        alone = dict.fromkeys(("blocks", "attention", "head", "update"), 0.1)
        kinds = (ALIGN, UNSHARED)
        ratios = {"token_ratio": 1.5, "operation_ratio": 1.25}
        return {"seconds": {kind: [1.0] for kind in kinds}, "parts": dict.fromkeys(kinds, alone)} | ratios

    monkeypatch.setattr(parts.contenders, "ask", ask)
    monkeypatch.setattr(parts.contenders, "model", lambda name: tmp_path / name)
    monkeypatch.setattr(parts, "RESULTS", tmp_path)
    one = ["--models", "30M", "--only", "short prompts, K = 2", "--pairs", "1"]
    assert parts.main([*one, "--repeats", "2"]) == parts.main([*one, "--repeats", "3"]) == 0
    assert asked == [0, 1, 2]
    assert len(json.loads((tmp_path / "parts.json").read_text())["steps"]) == 3
    assert parts.main([*one[:-1], "2", "--repeats", "1"]) == 0
    assert len(json.loads((tmp_path / "parts.json").read_text())["steps"]) == 1, "other steps are not mixed with them"


def test_the_gain_of_sharing_is_taken_pair_by_pair() -> None:
    alone = {"blocks": 1.0, "attention": 0.5, "head": 0.25, "update": 0.125}
    step = {"token_ratio": 1.5, "operation_ratio": 1.25, "parts": {ALIGN: alone, UNSHARED: {**alone, "blocks": 2.0}}}
    steps = [
        step | {"case": "one", "round": 0, "seconds": {ALIGN: [2.0, 4.0], UNSHARED: [3.0, 5.0]}},
        step | {"case": "one", "round": 1, "seconds": {ALIGN: [8.0], UNSHARED: [16.0]}},
    ]
    found = parts.figures({"steps": steps})["one"]
    assert found["ratio"] == {"median": 1.5, "min": 1.25, "max": 2.0, "rounds": 3}
    assert found["reached"] and found["target"] == pytest.approx(1.35)
    assert found["parts"][ALIGN] == {**alone, "rest": 4.0 - 1.875, "whole": 4.0}
    assert found["parts"][UNSHARED]["rest"] == pytest.approx(5.0 - 2.875)
    told = parts.lines({"figures": {"one": found}})[-1]
    assert "1.50** (1.25 to 2.00)" in told and "| 1.25 |" in told


def test_the_picture_is_drawn_from_the_json_alone(tmp_path: Path) -> None:
    uf = TABLES["UltraFeedback-like"]
    target = case(table=uf, contenders=(ALIGN, TUNED))
    ablated = case(table=uf, part="ablations", contenders=(ALIGN, "align without cache"))
    points = [case(table=uf, part="K", responses=k, x=k, contenders=(ALIGN,)) for k in (2, 3)]
    sizes = [case(part="dataset", timed=timed, x=timed, contenders=(ALIGN,)) for timed in (2, 5)]
    runs = [
        run(contender, 0, [1.0] * one.timed, case=one.name)
        for one in (target, ablated, *points, *sizes)
        for contender in one.contenders
    ]
    data = json.loads(json.dumps(benchmark_of(*runs, cases=(target, ablated, *points, *sizes))))
    picture.draw(data, tmp_path / "one.svg")
    drawn = (tmp_path / "one.svg").read_text()
    for words in ("TRL tuned", "without cache", "Responses of a prompt", "not measured", "tokens in the dataset"):
        assert words in drawn, words
    picture.draw(data, tmp_path / "two.svg")
    assert (tmp_path / "two.svg").read_text() == drawn


def test_every_online_case_gives_both_sides_the_same_settings() -> None:
    named = [one.name for one in online.cases(2)]
    assert len(set(named)) == len(named) == 4
    for one in online.cases(2):
        more = online.overrides(one)
        command = contenders.align_command(one, ALIGN, model=Path("m"), rows=Path("r"), run_dir=Path("d"), more=more)
        given = dict(word.split("=", 1) for word in command[2:])
        job = online.peer_job(one, model=Path("m"), rows=Path("r"), micro_batch=8)
        assert given["algo"] == job["algorithm"] == one.algo
        assert float(given[online.KL[one.algo]]) == job["beta"]
        assert (given["scorer.pattern"], given["engine.precision"]) == (f'"{job["pattern"]}"', job["precision"])
        assert float(given["train.lr"]) == job["lr"]
        counts = ("train.prompts", "source.samples", "source.max_new_tokens", "train.steps")
        assert [int(given[key]) for key in counts] == [job["groups"], job["samples"], job["new_tokens"], job["steps"]]
        assert given["source"] == "rollout"
        assert len(job["order"]) == one.groups * one.steps


def test_align_reads_an_online_command_and_its_prompts(tmp_path: Path) -> None:
    for one in online.cases(1)[:2]:
        small = replace(one, shape=SHAPES["tiny"])
        written = groups.fill(bench.lengths_of(small), vocabulary=small.shape.vocabulary, seed=0)
        rows = groups.write_rows(groups.placed(written, bench.epoch_order(small.rows)), tmp_path / "rows.jsonl")
        model = shapes.write_model(small.shape, tmp_path / "model", seed=0)
        command = contenders.align_command(
            small, ALIGN, model=model, rows=rows, run_dir=tmp_path / "run", more=online.overrides(small)
        )
        assert tokens.digest(command[2:], cache=tmp_path / "cache", steps=small.steps) == groups.digest_of(written)


def test_samplers_draw_the_same_number_of_tokens_and_take_turns(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(shapes.write_model(SHAPES["tiny"], tmp_path, seed=0))
    sides = sampling.samplers(model, [[5, 6], [7, 8, 9]], responses=3, new_tokens=4, pad_id=0)
    assert {name: side(1) for name, side in sides.items()} == {"align": 24, "generate": 24}
    asked: list[tuple[str, int]] = []

    def counted(name: str) -> Any:
        return lambda number: asked.append((name, number)) or 1

    speeds = sampling.alternate({name: counted(name) for name in sides}, rounds=2)
    assert [name for name, _ in asked] == ["align", "generate", "generate", "align", "align", "generate"]
    assert {name: len(values) for name, values in speeds.items()} == {"align": 2, "generate": 2}


def test_online_ratios_are_of_neighbours_and_held_against_their_targets() -> None:
    one = replace(online.cases(2)[0], timed=2)  # 64 prompts, 4 samples of each, 2 warm steps
    runs = [
        run(contender, number, [9.0, *seconds], peak=peak, case=one.name, response_tokens=18.5)
        for contender, number, seconds, peak in (
            (ALIGN, 0, [1.0, 1.0], 1.0),
            (TUNED, 0, [2.0, 2.0], 2.0),
            (TUNED, 1, [4.0, 4.0], 2.0),
            (ALIGN, 1, [4.0, 4.0], 1.0),
        )
    ]
    data: dict[str, Any] = benchmark_of(*runs) | {
        "sampling": {"tokens_per_second": {"align": [8.0, 9.0, 1.0], "generate": [10.0, 9.0, 1.25]}},
    }
    data["settings"] = data["settings"] | {"cases": {one.name: online.settings_of(one)}}
    data["figures"] = online.figures(data)
    assert results.check(data) == []
    assert data["figures"]["sampling"]["ratio"] == {"median": 0.8, "min": 0.8, "max": 1.0, "rounds": 3}
    (row,) = data["figures"]["steps"]
    assert row["speed"] == {"median": 1.5, "min": 1.0, "max": 2.0, "rounds": 2}
    assert row["memory"]["median"] == 0.5
    assert row[ALIGN]["samples_per_second"]["median"] == (256 + 64) / 2
    assert row["reached"]
    told = "\n".join(online.lines(data))
    assert "| **0.80** (0.80 to 1.00) | ≥ 0.9 | | not reached |" in told
    assert "| **1.50** (1.00 to 2.00) | ≥ 1.5 | 0.50 | reached |" in told


def test_the_online_command_has_arguments_of_its_own() -> None:
    given = online.parse(["--only", "grpo", "--repeats", "2"])
    assert (given.only, given.repeats, given.name, given.show) == ("grpo", 2, "online", False)
    assert online.main(["--only", "no such case"]) == 2
