"""`align sample`: samples for a file of prompts, into a file that training reads."""

from collections.abc import Sequence
from pathlib import Path

from align_cli import config, exits, paths, terminal
from align_cli.commands import arguments
from align_cli.config import Tree
from align_cli.errors import Stopped, UserError

USAGE = "align sample RUN_OR_MODEL PROMPTS OUT.jsonl [samples=K] [temperature=T] [scorer=NAME] [key=value ...]"


def main(argv: Sequence[str]) -> int:
    """`sample RUN_OR_MODEL PROMPTS OUT.jsonl [key=value ...]`; returns the exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        terminal.result(f"{USAGE}\n\n{arguments.explained('sample')}")
        return exits.DONE if argv else exits.USER
    target, source, out = (*argv[:3], *[""] * (3 - len(argv[:3])))
    wrong = [word for word in (target, source, out) if not word or word.startswith("-")]
    if wrong or ("=" in out and not out.endswith(".jsonl")):
        raise UserError(f"the run or model, the prompts and the file of samples come first: {USAGE}")
    given = arguments.parse(argv[3:])
    if given.show_config:
        given.print_config("sample")
        return exits.DONE
    tree = given.compose("sample")
    from align_cli import cache, launch, sample, subject

    problems = check(tree)
    if problems:
        raise UserError("\n".join(problems))
    launch.refuse_foreign_ranks("sample")
    options = config.build(sample.Options, tree)
    with exits.terminable(), cache.in_use(paths.cache()):
        try:
            asked = subject.find(target, options)
            done = sample.sample(asked, Path(source).expanduser(), Path(out).expanduser(), options, tree.get("scorer"))
        except KeyboardInterrupt:
            raise Stopped("interrupted; what was generated is kept") from None
    for line in done:
        terminal.say(line)
    return exits.DONE


def check(tree: Tree) -> list[str]:
    """What is wrong with the configuration."""
    from align_cli.evals import prompts
    from align_cli.sample import Options

    own = {key: value for key, value in tree.items() if key != "scorer"}
    problems = config.check(Options, own, "")
    if not problems and tree["temperature"] == 0 and tree["samples"] > 1:
        problems.append(
            f"samples={tree['samples']} temperature=0: all samples of a prompt would be the same; use samples=1."
        )
    if tree.get("scorer") is not None:
        try:
            prompts.scorer_in(tree["scorer"])
        except UserError as error:
            problems += str(error).splitlines()
    return problems
