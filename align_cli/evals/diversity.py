"""How much samples differ from each other, how long they are, and whether they end."""

from statistics import fmean

from align_cli.diversity import distinct, self_bleu
from align_cli.evals import Item, Result, Training, prompts
from align_cli.ranges import Count, Positive
from align_cli.subject import Subject

GRAMS = (1, 2, 3)


def diversity(
    subject: Subject,
    *,
    training: Training,
    limit: Count | None,
    samples: Count,
    temperature: Positive,
    max_new_tokens: Count,
) -> Result:
    """Of samples for held-out prompts: different n-grams among a prompt's and among all, self-BLEU, length, ending.

    Args:
        limit: at most so many held-out prompts.
        samples: responses to each.
        temperature: of the samples.
        max_new_tokens: longest response; fewer where the model's positions leave less.
    """
    asked = prompts.held_out(subject, training, limit=limit, responses=False)
    found = prompts.drawn(subject, asked, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens)
    items: list[Item] = []
    for name, prompt, texts, drawn in zip(
        prompts.ids(asked.groups), found.prompts, found.texts, found.responses, strict=True
    ):
        values = {f"distinct_{n}_of_a_prompt": distinct(texts, n) for n in GRAMS}
        if samples > 1:
            values["self_bleu"] = fmean(self_bleu(texts))
        values["tokens"] = sum(len(each.tokens) for each in drawn) / samples
        values["ended"] = sum(each.ended for each in drawn) / samples
        items.append(Item(name, values, {"prompt": prompt, "responses": texts}))
    every = [text for texts in found.texts for text in texts]
    return Result(
        items,
        figures={f"distinct_{n}": distinct(every, n) for n in GRAMS},
        made={
            **asked.made,
            "samples": samples,
            "temperature": temperature,
            "max_new_tokens": found.max_new_tokens,
        },
        notes=prompts.tell_cut(found.responses),
    )
