"""`align plan`: what a run would do, from its configuration alone: no weights, no data.

The network is asked only where the YAML of a model does not write its sizes out and it is no folder here (model=hf).
"""

import math
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from align_cli import exits, experiment, memory, reading, resources
from align_cli.commands import arguments
from align_cli.experiment import Experiment
from align_cli.raters import FromEnsemble


def main(argv: list[str]) -> int:
    """`plan [key=value ...]`; returns 0 if the run fits, 1 if it does not."""
    given = arguments.parse(argv)
    if given.show_config:
        given.print_config()
        return exits.DONE
    checked = reading.read(reading.placed(given.compose(), "runs/<time>"), planned=True)
    console = Console()
    console.print(way(checked), soft_wrap=True, markup=False, highlight=False)
    if checked.choice is not None:
        console.print(checked.choice.reason, soft_wrap=True, markup=False, highlight=False)
    console.print(columns_table(checked))
    for line in schedule(checked):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    fits = report_memory(checked, console)
    return exits.DONE if fits else exits.FAILED


def way(checked: Experiment) -> str:
    """The files that a batch passes through, in order."""
    made = ", ".join(checked.made) or "nothing"
    return (
        f"data/{checked.data.name} -> data/tokens -> data/store -> data/batches -> columns ({made}) -> engine.measure "
        f"({checked.engine.name}) -> losses/{checked.algorithm} -> engine.backward, engine.step -> tracking"
    )


def columns_table(checked: Experiment) -> Table:
    """Each column that the loss needs, what it is, and who makes it."""
    from align_cli.columns import GLOSSARY

    table = Table("column", "what", "from", title=f"columns of {checked.algorithm}", title_justify="left")
    for name, maker in experiment.column_makers(checked).items():
        table.add_row(name, GLOSSARY[name], maker)
    return table


def schedule(checked: Experiment) -> list[str]:
    """Steps and tokens, as far as the data's YAML states its size."""
    size = resources.sizes(checked)
    train = checked.train
    if "prompts" not in size:
        steps = f"{train.steps} optimizer steps" if train.steps else f"{train.epochs} epoch(s); steps follow the data"
        return [f"{steps} of {train.prompts} prompts; the size of {checked.data.path} is known when it is read"]
    prompts = int(size["prompts"]) if checked.data.limit is None else min(int(size["prompts"]), checked.data.limit)
    steps = train.steps or train.epochs * math.ceil(prompts / train.prompts)
    group = size["prompt_tokens"] + size["responses"] * size["response_tokens"]
    copies = size["responses"] * (size["prompt_tokens"] + size["response_tokens"])
    per_step = train.prompts * group
    parts = max(resources.devices(checked), math.ceil(per_step / checked.engine.micro_tokens))
    return [
        f"{steps} optimizer steps of {train.prompts} prompts x {size['responses']:.0f} responses, "
        f"about {prompts} prompts x {train.epochs} epoch(s)",
        f"about {per_step:,.0f} tokens a step in at least {parts} micro-batches over {resources.devices(checked)} "
        f"rank(s), {steps * per_step:,.0f} in all; a prompt counts once, {copies / group:.2f} times fewer than with a "
        "copy of it for each response",
    ]


def report_memory(checked: Experiment, console: Console) -> bool:
    """Print the memory by term and, where it does not fit, what would help; returns whether it fits."""
    if checked.model.path == "world":
        console.print("memory: the embedded world's model is made on first use; it needs less than 2 GB")
        return True
    shape = resources.shape_of(checked)
    there, source = resources.room(checked)
    found = resources.terms(checked, shape)
    total = sum(found.values())
    kind = "GPU" if resources.on_gpu(checked) else "CPU"
    table = Table("term", "GB", title=f"memory of each {kind} rank", title_justify="left")
    for name, value in found.items():
        table.add_row(name, f"{value / 1e9:.2f}")
    table.add_row("total", f"{total / 1e9:.2f}", style="bold")
    console.print(table)
    dtype = str(resources.dtype(checked)).removeprefix("torch.")
    console.print(
        f"{shape.parameters:,} weights, {shape.trained:,} trained, in {dtype}; "
        f"a device has {there / 1e9:.0f} GB ({source})",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )
    if total <= there:
        console.print(f"fits, with {(there - total) / 1e9:.1f} GB to spare")
        return True
    console.print(f"does not fit, by {(total - there) / 1e9:.1f} GB. What would help:")
    for change, needed in remedies(checked, shape, there):
        verdict = "fits" if needed <= there else "not enough alone"
        console.print(f"  {change}: {needed / 1e9:.1f} GB, {verdict}", soft_wrap=True, markup=False, highlight=False)
    return False


def remedies(checked: Experiment, shape: memory.Shape, there: float) -> list[tuple[str, float]]:
    """Changes that need less memory, the most effective first, with the bytes that remain; `there` are available."""
    engine, launch = checked.engine, checked.launch
    strongest = "zero3" if checked.adapter.bits is None else "zero2"
    fewer = max(1, engine.micro_tokens // 4)
    tried = {
        "engine.gradient_checkpointing=true": replace(checked, engine=replace(engine, gradient_checkpointing=True)),
        f"engine.micro_tokens={fewer}": replace(checked, engine=replace(engine, micro_tokens=fewer)),
        f"engine={strongest}": replace(checked, engine=replace(engine, name=strongest), choice=None),
        "reference=cached": replace(checked, reference=replace(checked.reference, name="cached")),
    }
    if isinstance(checked.scorer, FromEnsemble):
        tried["scorer.apart=true"] = replace(checked, scorer=replace(checked.scorer, apart=True))
    found = {change: _needed(other, shape) for change, other in tried.items()}
    if checked.adapter.rank is None:
        lora = replace(checked.adapter, name="lora", rank=16, scale=16.0, targets="all-linear")
        adapted = replace(checked, adapter=lora)
        found["adapter=lora"] = _needed(adapted, resources.shape_of(adapted))
    light = replace(engine, name=strongest, gradient_checkpointing=True)
    for power in range(11):
        spread = replace(checked, engine=light, launch=replace(launch, devices=2**power), choice=None)
        needed = _needed(spread, shape)
        if needed <= min(there, resources.room(spread)[0]):
            found[f"engine={strongest} engine.gradient_checkpointing=true launch.devices={2**power}"] = needed
            break
    now = _needed(checked, shape)
    return sorted(((c, needed) for c, needed in found.items() if needed < 0.99 * now), key=lambda it: it[1])


def _needed(checked: Experiment, shape: memory.Shape) -> float:
    """Bytes on one device; a stage that was not named is chosen again."""
    if checked.choice is not None and resources.devices(checked) > 1:
        checked = resources.lowest(checked, shape)
    return sum(resources.terms(checked, shape).values())
