"""HuggingFaceH4/ultrafeedback_binarized: the hub's ready-made pairs of UltraFeedback.

The chosen response is the one with the highest score, the rejected one drawn from the other three. The scores of a
part of the pairs tie, so the rating is 1 for chosen and 0 for rejected.
"""

from align_cli.data.fields import field, preferred, split_dialogues
from align_cli.data.records import Record, Row


def record(row: Row, where: str) -> Record:
    """A row: prompt (text), chosen and rejected (whole dialogues)."""
    return preferred(*split_dialogues(field(row, "chosen"), field(row, "rejected"), row.get("prompt")), where)
