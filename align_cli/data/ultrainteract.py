"""openbmb/UltraInteract_pair: preference pairs over trees of reasoning.

The whole trajectory, with the turns of the assistant, of the interpreter and of the critic, is the prompt; chosen and
rejected are the assistant's next action.
"""

from align_cli.data.fields import field, messages, preferred, text
from align_cli.data.records import Record, Row


def record(row: Row, where: str) -> Record:
    """A row: trajectory[{from, value}], chosen, rejected."""
    prompt = messages(field(row, "trajectory"), "trajectory")
    return preferred(prompt, text(field(row, "chosen"), "chosen"), text(field(row, "rejected"), "rejected"), where)
