"""openai/summarize_from_feedback, `comparisons`: two summaries of a Reddit post, and which one a person chose.

Prompts are written as in the dataset's paper and in EXO's code, to be continued as text: a summary begins with a
space.
"""

from align_cli.data.fields import field, items, mapping, preferred, text
from align_cli.data.records import Record, Row, RowError


def record(row: Row, where: str) -> Record:
    """A row: info {subreddit, title, post}, summaries [{text}, {text}], choice (0 or 1)."""
    info = mapping(field(row, "info"), "info")
    subreddit, title, post = (text(field(info, key), f"info.{key}") for key in ("subreddit", "title", "post"))
    summaries = [mapping(summary, "summaries") for summary in items(field(row, "summaries"), "summaries")]
    choice = field(row, "choice")
    if len(summaries) != 2 or choice not in (0, 1):
        raise RowError(f"{len(summaries)} summaries and choice {choice!r}, where 2 and 0 or 1 should be")
    one, two = (" " + text(field(summary, "text"), "summaries.text").strip() for summary in summaries)
    prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
    return preferred(prompt, *((two, one) if choice == 1 else (one, two)), where)
