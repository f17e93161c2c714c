"""openbmb/UltraFeedback: an instruction and up to four models' responses, rated by GPT-4.

The rating is `overall_score` (1 to 10), as in the NCA paper, not the mean of the four aspects. Before the revision of
29 December 2023 some 2,600 responses that deserved 1 had 10; conf/data/ultrafeedback.yaml names a later one.
"""

from align_cli.data.fields import field, items, mapping, number, one_user, record_of, text
from align_cli.data.records import Record, Row


def record(row: Row, where: str) -> Record:
    """A raw row: instruction, completions[{response, overall_score, ...}]."""
    responses, ratings = [], []
    for index, item in enumerate(items(field(row, "completions"), "completions")):
        completion = mapping(item, f"completions[{index}]")
        responses.append(text(field(completion, "response"), f"completions[{index}].response"))
        ratings.append(number(completion.get("overall_score"), f"completions[{index}].overall_score"))
    return record_of(one_user(text(field(row, "instruction"), "instruction")), responses, ratings, where)
