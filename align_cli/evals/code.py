"""Programs that the model writes, run with their tests: HumanEval, MBPP, LeetCode, and files like them."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from align_cli import process, terminal
from align_cli.config import find
from align_cli.data import benchmarks
from align_cli.data.benchmarks import Benchmark, Subsets, Task
from align_cli.data.records import Message
from align_cli.errors import UserError
from align_cli.evals import Item, Result
from align_cli.evals.prompting import Template, resolved
from align_cli.ranges import Count, NonNegative, NotEmpty
from align_cli.sandbox import Sandbox, Verdict
from align_cli.subject import Prompt, Subject

FENCED = re.compile(r"```[ \t]*(?:python|py|Python)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code(
    subject: Subject,
    *,
    sandbox: Sandbox,
    path: NotEmpty | None,
    hub: NotEmpty | None,
    revision: NotEmpty | None,
    subset: Subsets,
    split: NotEmpty,
    source: NotEmpty,
    rows: Literal["humaneval", "mbpp", "leetcode"],
    limit: Count | None,
    template: Template,
    prompt: NotEmpty,
    stop: list[NotEmpty],
    samples: Count,
    k: list[Count],
    temperature: NonNegative,
    max_new_tokens: Count,
) -> Result:
    """`pass@k`: how likely one of k programs passes all tests of its task, for each k.

    Args:
        sandbox: where the programs run.
        path, hub, revision, subset, split, source: where the tasks are (`align_cli.data.benchmarks.Benchmark`).
        rows: the schema of a row.
        limit: at most so many tasks.
        template: chat: the task in words is asked, and the first block of code of the response is the program; text:
            the model goes on with the program that the task begins; auto: a chat where the model has a template.
        prompt: what a chat asks, with the task in the place of {task} and the name to define in that of {entry}.
        stop: texts that end a response to a text.
        samples: programs for each task.
        k: at most `samples` each.
        temperature: of the programs; 0 is the most likely one.
        max_new_tokens: longest response.

    Raises:
        UserError: the tasks are not at hand, or a row cannot be read.
    """
    if "{task}" not in prompt:
        raise UserError(f"eval.prompt={prompt!r}: give a text with {{task}} in it.")
    if not k or max(k) > samples:
        raise UserError(f"eval.k={k}: use numbers of at most eval.samples={samples}.")
    data = Benchmark(path=path, hub=hub, revision=revision, subset=subset, split=split, source=source)
    labelled, digest = benchmarks.load(data)
    tasks, _ = benchmarks.read(labelled[:limit], find("align_cli.data.benchmarks", rows, "eval", told="rows"))
    kind = resolved(template, subject)
    asked = [_asked(task, prompt, kind) for task in tasks]
    drawn = subject.respond(
        asked,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        stop=stop if kind == "text" else [],
    )
    programs = [[program_of(task, each, kind) for each in found] for task, found in zip(tasks, drawn, strict=True)]
    verdicts = _run(sandbox, tasks, programs)
    items = [
        _item(task, prompted, written, told, k)
        for task, prompted, written, told in zip(tasks, asked, programs, verdicts, strict=True)
    ]
    counts = Counter(verdict.why for told in verdicts for verdict in told)
    made = {
        "data": data.name,
        "data.digest": digest,
        "template": kind,
        "temperature": temperature,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "sandbox": sandbox.isolation,
    }
    total = sum(counts.values())
    found = ", ".join(f"{number} {why}" for why, number in sorted(counts.items()))
    return Result(items, made=made, notes=[f"Of {total} programs: {found}."])


def pass_at(k: int, *, samples: int, passed: int) -> float:
    """An unbiased estimate of how likely one of k programs passes, 1 - C(n-c, k) / C(n, k).

    M. Chen et al. 2021, arXiv 2107.03374, equation 1.

    Args:
        samples: n, programs that were run, at least k.
        passed: c of them passed.
    """
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def program_of(task: Task, response: str, kind: Literal["chat", "text"]) -> str:
    """The program in a response.

    A text goes on with what the task begins. In a chat it is the first block of code, or all of it where there is no
    block; where it does not define what is asked for, it is taken as a continuation.
    """
    if kind == "text":
        return task.begun + response
    block = FENCED.search(response)
    written = block[1] if block else response
    if re.search(rf"^(?:async\s+def|def|class)\s+{re.escape(task.entry)}\b", written, flags=re.MULTILINE):
        return written
    return task.begun + written


def _asked(task: Task, prompt: str, kind: Literal["chat", "text"]) -> Prompt:
    if kind == "text":
        return task.begun
    asked = prompt.replace("{entry}", task.entry).replace("{task}", task.asked)
    return [Message(role="user", content=asked)]


def _run(sandbox: Sandbox, tasks: Sequence[Task], programs: Sequence[Sequence[str]]) -> list[list[Verdict]]:
    """The verdict on each program; the same program for the same task is run once."""
    wanted = {(place, program) for place, written in enumerate(programs) for program in written}
    order = sorted(wanted)

    def one(asked: tuple[int, str]) -> Verdict:
        place, program = asked
        return sandbox.run(f"{tasks[place].before}\n{program}", tasks[place].tests)

    told: dict[tuple[int, str], Verdict] = {}
    with terminal.counter() as progress, ThreadPoolExecutor(process.cores()) as pool:
        for asked, verdict in zip(order, pool.map(one, order), strict=True):
            told[asked] = verdict
            progress("running", len(told), len(order))
    return [[told[place, program] for program in written] for place, written in enumerate(programs)]


def _item(task: Task, prompted: Prompt, written: Sequence[str], told: Sequence[Verdict], k: Sequence[int]) -> Item:
    passed = sum(verdict.passed for verdict in told)
    return Item(
        id=task.id,
        values={f"pass@{each}": pass_at(each, samples=len(told), passed=passed) for each in k},
        shown={
            "prompt": prompted,
            "programs": list(written),
            "tests": task.tests,
            "verdicts": [f"{verdict.why}: {verdict.detail}" if verdict.detail else verdict.why for verdict in told],
        },
    )
