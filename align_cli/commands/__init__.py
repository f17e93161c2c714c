"""The commands of `align` that are not `train`: each module reads its arguments and prints."""

# The module of each command; its `main` takes the arguments and returns the exit code.
COMMANDS = {
    "train": "train",
    "plan": "plan",
    "data": "data",
    "ls": "listing",
    "show": "listing",
    "cp": "listing",
    "export": "export",
    "doctor": "doctor",
}
