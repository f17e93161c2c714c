"""stanfordnlp/imdb: film reviews, each cut into its first words, the prompt, and the rest.

EXO's code cuts behind ten GPT-2 tokens; the cut here is behind eight words, about as much, and does not depend on a
tokenizer. The rating is the review's label, 1 where it is positive. Rows in another schema, such as scored samples of
a model on such prompts ({prompt, completions, rewards}), are detected.
"""

from align_cli.data import schemas
from align_cli.data.fields import field, number, record_of, text
from align_cli.data.records import Record, Row, RowError

PROMPT_WORDS = 8


def record(row: Row, where: str) -> Record:
    """A row: text, label (0 or 1); or of any known schema."""
    if "text" not in row:
        return schemas.record(row, where)
    review = text(field(row, "text"), "text").replace("<br />", "\n").strip()
    words = review.split(maxsplit=PROMPT_WORDS)
    if len(words) <= PROMPT_WORDS:
        raise RowError(f"a review of {len(words)} words: nothing is left behind a prompt of {PROMPT_WORDS}")
    rest = words[PROMPT_WORDS]
    cut = len(review) - len(rest)
    prompt = review[:cut].rstrip()
    return record_of(prompt, (review[len(prompt) :],), (number(row.get("label"), "label"),), where)
