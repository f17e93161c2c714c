"""`align`: one word for what to do, then Hydra's overrides or that command's own arguments.

Nothing heavy is imported until a command needs it.
"""

import importlib
import sys

from align_cli import exits, paths, process, terminal
from align_cli.commands import COMMANDS
from align_cli.config import did_you_mean
from align_cli.errors import UserError

USAGE = """align: language-model alignment experiments

  align train [key=value ...]        train; without arguments: NCA on the embedded world
  align train -m algo=nca,dpo ...    every combination, each a run of its own
  align score [key=value ...]        measure the reference of the whole dataset and keep it; trains nothing
  align plan [key=value ...]         what a run would do: columns, steps, memory; loads nothing
  align data show [key=value ...]    a tokenised example, with what is trained on
  align ls [GROUP]                   algorithms, models, datasets, recipes, runs
  align show NAME                    a recipe, a group's YAML, or a run
  align cp NAME DEST                 copy a recipe or a YAML to make it your own
  align compare RUN_OR_SWEEP ...     groups of finished runs: means over seeds, differences, 95 % intervals
  align evaluate RUN_OR_MODEL eval=NAME,... [key=value ...]   figures with 95 % intervals, and how they were made
  align evaluate calibrate FILE judge=NAME   how far a judge agrees with published preferences
  align sample RUN_OR_MODEL PROMPTS OUT.jsonl [key=value ...]   K samples of each prompt, in rows that training reads
  align chat RUN_OR_MODEL [--against RUN_OR_MODEL]   a conversation on the terminal, with one or two side by side
  align report RUN_OR_SWEEP ...      a page with curves, heat maps, samples and verdicts, in one HTML file
  align reproduce NAME|--list        a table or figure of a paper: its runs, measured, held against what it claims
  align study NAME [seed=N]          one seed of a study on an enumerable model
  align verify [ALGO ...]            algorithms held against what their papers prove; a plugin's, too
  align export RUN DEST              a run's model as a Hugging Face folder, adapters merged
  align cache ls|verify|gc           what is kept on disk; recompute a sample of it; remove what is not used
  align doctor                       versions, devices, what works here

options of train, score, plan and data show:
  -m, --multirun       run every combination of comma-separated values (train)
  --config-dir DIR     more choices of your own: DIR/algo/mine.yaml
  --plugin PACKAGE     parts of your own: PACKAGE/losses/mine.py, and PACKAGE/conf as a --config-dir
  --cfg                print the composed configuration and stop

  align --version      which version this is
  eval "$(align -sc install=bash)"   in .bashrc: TAB completes commands, choices and keys

exit codes: 0 done, 1 failure, 2 a mistake in what was given, 75 stopped by a signal and resumable
"""


def main() -> None:
    """The console script `align`."""
    process.settle()
    sys.exit(exits.guarded(lambda: dispatch(sys.argv[1:])))


def dispatch(argv: list[str]) -> int:
    """Run the command that `argv` names; returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        terminal.result(USAGE.rstrip())
        return exits.DONE
    if argv[0] in ("-V", "--version", "version"):
        from align_cli import __version__

        terminal.result(f"align {__version__}")
        return exits.DONE
    if argv[0] == "-sc":
        return importlib.import_module("align_cli.commands.completion").main(argv[1:])
    name = argv[0]
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command.{did_you_mean(name, list(COMMANDS))} See align --help.")
    if name in ("train", "score", "plan", "data") and {"-h", "--help"} & set(argv[1:]):
        keys = (paths.conf() / "train.yaml").read_text(encoding="utf-8").rstrip()
        terminal.result(f"{USAGE.rstrip()}\n\nGroups and keys, with what they are by default:\n\n{keys}")
        return exits.DONE
    terminal.quiet_libraries()
    command = importlib.import_module(f"align_cli.commands.{COMMANDS[name]}")
    return command.main(argv if COMMANDS[name] == "listing" else argv[1:])


if __name__ == "__main__":
    main()
