"""One tokenised example on the terminal, with what is trained on."""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align_cli import terminal
from align_cli.data.store import Store
from align_cli.errors import UserError

PROMPT, TRAINED, SPECIAL = "dim", "green", "bold reverse"


def show(store: Store, tokenizer: PreTrainedTokenizerBase, index: int, console: Console) -> None:
    """Print a group: the prompt dim, the tokens that are trained on green, special tokens reversed.

    Raises:
        UserError: the store has no such group.
    """
    if not 0 <= index < len(store):
        raise UserError(f"index={index}: the data has prompts 0 to {len(store) - 1}.")
    group = store[index]
    console.print(Text(f"{group.where}: {len(group.responses)} responses", style="bold"))
    prompt = group.prompt.tolist()
    console.print(Text(f"\nprompt, {len(prompt)} tokens, not trained on", style="bold"))
    console.print(written(tokenizer, [], prompt, PROMPT), soft_wrap=True)
    console.print(Text("ids " + " ".join(map(str, prompt)), style="dim"), soft_wrap=True)
    for number, (response, rating) in enumerate(zip(group.responses, group.ratings.tolist(), strict=True)):
        ids = response.tolist()
        console.print(Text(f"\nresponse {number}, rating {rating:g}, {len(ids)} tokens, trained on", style="bold"))
        console.print(written(tokenizer, prompt, ids, TRAINED), soft_wrap=True)
        console.print(Text("ids " + " ".join(map(str, ids)), style="dim"), soft_wrap=True)


def written(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int], style: str) -> Text:
    """The text of `ids` behind `before`; special tokens stand out by their names."""
    special = set(tokenizer.all_special_ids)
    text, done = Text(), list(before)
    for is_special, run in groupby(ids, special.__contains__):
        piece = list(run)
        if is_special:
            names = [str(tokenizer.convert_ids_to_tokens(token)) for token in piece]
            text.append("".join(names), style=SPECIAL)
        else:
            text.append(terminal.visible(decoded(tokenizer, done, piece)), style=style)
        done += piece
    return text


def decoded(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add behind `before`: some tokenizers drop the space at the start of a text."""
    whole = str(tokenizer.decode([*before, *ids], clean_up_tokenization_spaces=False))
    start = str(tokenizer.decode(list(before), clean_up_tokenization_spaces=False)) if before else ""
    return whole[len(start) :]
