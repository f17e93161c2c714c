"""Algorithms by name: which there are, all checks of one, and many of them in processes of their own."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from align_cli import config, terminal
from align_cli.columns import asked
from align_cli.errors import UserError
from align_cli.verify import checks, identities, problems, training, world
from align_cli.verify.checks import Check
from align_cli.verify.problems import composed, divergence_of


@dataclass(frozen=True)
class Subject:
    """An algorithm, and a divergence if it takes one."""

    algorithm: str
    divergence: str | None = None


def subjects(names: Sequence[str], config_dirs: Sequence[str]) -> list[Subject]:
    """What is to be examined: these algorithms, or all, each with every divergence that it can take.

    Raises:
        UserError: there is no such algorithm.
    """
    groups = config.group_names(config_dirs)
    there = groups["algo"]
    problems = [
        f"{name}: there is no such algorithm.{config.did_you_mean(name, there)} There are {', '.join(there)}."
        for name in dict.fromkeys(names)
        if name not in there
    ]
    if problems:
        raise UserError("\n".join(problems))
    found: list[Subject] = []
    for name in dict.fromkeys(names or there):
        tree = composed((f"algo={name}",), tuple(config_dirs))
        loss = config.find("align_cli.losses", tree["algo"]["name"], "algo")
        if "divergence" not in config.options(loss):
            found.append(Subject(name))
            continue
        for divergence in groups["divergence"]:
            tree = composed((f"algo={name}", f"divergence={divergence}"), tuple(config_dirs))
            # One that is an implicit reward has to give every reward a policy.
            if "target" in asked(loss) or divergence_of(tree).links:
                found.append(Subject(name, divergence))
    return found


def examine(subject: Subject, config_dirs: Sequence[str], folder: Path) -> list[Check]:
    """All checks of one.

    Args:
        folder: empty; what is written goes there.

    Raises:
        UserError: the algorithm cannot be composed.
    """
    transformers_logging.disable_progress_bar()
    made = world.build(folder / "model", seed=0)
    label = f"{subject.algorithm} {subject.divergence or ''}".strip()
    try:
        problem = problems.pose(made, subject.algorithm, subject.divergence, config_dirs)
    except UserError:
        raise
    except Exception as error:  # a user's `optimum` may raise anything
        return [checks.failed(label, "optimum", checks.raised(error))]
    rows = checks.of_loss(problem)
    ours = problem.module.__name__.startswith("align_cli.")
    rows += identities.of(subject.algorithm) if ours and _first(subject) else []
    try:
        rows += checks.reached(problem, made, training.train(made, problem, folder / "trained", list(config_dirs)))
    except Exception as error:  # and so may a user's loss
        rows.append(checks.failed(label, "training", checks.raised(error)))
    return rows


def _first(subject: Subject) -> bool:
    """Whether statements that are of no divergence are told with this one."""
    return subject.divergence in (None, "reverse_kl")


def examine_all(
    given: Sequence[Subject], config_dirs: Sequence[str], *, processes: int, progress: Callable[[str, int, int], None]
) -> Iterator[tuple[Subject, list[Check]]]:
    """Each with its checks, in the order given, computed side by side.

    Args:
        processes: at most; each uses one thread.
        progress: is told what has been examined.
    """
    with tempfile.TemporaryDirectory(prefix="align-verify-") as home:
        arguments = (home, config.plugins()[1::2])
        with ProcessPoolExecutor(
            min(processes, len(given)), get_context("spawn"), initializer=_settle, initargs=arguments
        ) as pool:
            futures: dict[Future[list[Check]], Subject] = {
                pool.submit(_examine, subject, tuple(config_dirs), home): subject for subject in given
            }
            try:
                for done, _ in enumerate(as_completed(futures), start=1):
                    progress("verify", done, len(futures))
                results = {subject: future.result() for future, subject in futures.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    for subject in given:
        yield subject, results[subject]


def _settle(home: str, plugins: Sequence[str]) -> None:
    """Of a process that examines: one thread, a cache that is thrown away, the user's packages."""
    os.environ["ALIGN_CACHE"] = str(Path(home) / "cache")
    torch.set_num_threads(1)
    terminal.quiet_libraries()
    config.use(plugins)


def _examine(subject: Subject, config_dirs: Sequence[str], home: str) -> list[Check]:
    with tempfile.TemporaryDirectory(dir=home) as folder:
        return examine(subject, config_dirs, Path(folder))
