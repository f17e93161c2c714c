"""The `data` section of the configuration: its keys, types and ranges. The values live in conf/data/*.yaml."""

from dataclasses import dataclass
from typing import Literal

from align_cli.ranges import Count, NotEmpty, WholeNumber

Format = Literal[
    "auto",
    "preference",
    "implicit_prompt",
    "unpaired",
    "rewards",
    "ranks",
    "completions",
    "nca",
    "nemo",
    "alpaca",
    "sharegpt",
    "sft",
    "prompt",
    "ultrafeedback",
    "ultrainteract",
    "hh",
    "tldr",
]
Keep = Literal["best_and_random", "first", "random"]
Pairs = Literal["best_random", "best_worst", "all"]
TemplateName = Literal["auto", "chat", "text"]
Truncation = Literal["drop", "truncate_prompt_left", "error"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, which responses are kept, and how they become tokens.

    Attributes:
        name: the dataset; `align_cli.data.<name>.record` turns its rows into records.
        path: a hub id, or a local file or folder.
        revision: the commit of a hub dataset.
        subset: the folder inside the dataset that is read; None reads all.
        split: the rows to train on.
        held_out_split: the rows to evaluate on; None, or a single file, takes `held_out` prompts out of `split`.
        format: the schema of the rows; auto lets `name` decide (`file` detects it, row by row).
        responses: the most responses to keep of a prompt; None keeps all.
        keep: which ones, where there are more.
        pairs: how algorithms that compare two choose them; None where the data has two. Others do not look at it.
        template: chat writes prompts with the tokenizer's chat template, text joins prompt and response as they are;
            auto is chat where the tokenizer has a template.
        system: a system message for dialogues without one.
        max_length: the most tokens of a prompt and its longest response together.
        max_prompt_length: the most tokens of a prompt; None sets no limit of its own.
        truncation: what becomes of prompts beyond these limits. Responses are never cut.
        bad_rows: how many malformed rows are skipped before the run stops.
        held_out: prompts for evaluation.
        limit: the most rows to read of `split`.
        expected: prompts, prompt_tokens and response_tokens (mean per prompt and per response), to plan without data.
    """

    name: str
    path: NotEmpty | None
    revision: str | None
    subset: str | None
    split: str
    held_out_split: str | None
    format: Format
    responses: Count | None
    keep: Keep
    pairs: Pairs | None
    template: TemplateName
    system: str | None
    max_length: Count
    max_prompt_length: Count | None
    truncation: Truncation
    bad_rows: WholeNumber
    held_out: WholeNumber
    limit: Count | None
    expected: dict[Literal["prompts", "responses", "prompt_tokens", "response_tokens"], int | float] | None
