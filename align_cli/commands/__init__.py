"""The commands of `align`: each module reads its arguments, does or starts the work, and returns an exit code."""

# The module of each command; its `main` takes the arguments and returns the exit code.
COMMANDS = {
    "train": "train",
    "plan": "plan",
    "data": "data",
    "score": "score",
    "cache": "cache",
    "ls": "listing",
    "show": "listing",
    "cp": "listing",
    "export": "export",
    "evaluate": "evaluate",
    "sample": "sample",
    "chat": "chat",
    "compare": "compare",
    "report": "report",
    "reproduce": "reproduce",
    "study": "study",
    "verify": "verify",
    "doctor": "doctor",
}
