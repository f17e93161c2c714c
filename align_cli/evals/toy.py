"""The embedded world's own question: is the sum right?"""

import json

from align_cli import config, terminal
from align_cli.data import toy as task
from align_cli.errors import UserError
from align_cli.evals import Item, Result
from align_cli.evaluate import grade, graded_figures
from align_cli.ranges import Count
from align_cli.run import world_of
from align_cli.subject import Subject
from align_cli.world import World


def toy(subject: Subject, *, limit: Count | None, samples: Count, max_new_tokens: Count) -> Result:
    """Exact match and graded reward of responses to the world's held-out additions: sampled, and most likely ones.

    Args:
        limit: at most so many prompts.
        samples: responses sampled for each prompt at temperature 1.
        max_new_tokens: longest response, stop token included.

    Raises:
        UserError: the run is not one of the embedded world.
    """
    tree = subject.config or config.compose("train", ["model=tiny"])
    if tree.get("world") is None:
        raise UserError(f"{subject.name}: a run without the embedded world; use eval=loss or reward.")
    made = world_of(World(**tree["world"]), terminal.say)
    prompts = [json.loads(line)["prompt"] for line in made.held_out.read_text(encoding="utf-8").splitlines()][:limit]
    sampled = subject.respond(prompts, samples=samples, temperature=1.0, max_new_tokens=max_new_tokens)
    greedy = [drawn[0] for drawn in subject.respond(prompts, samples=1, temperature=0.0, max_new_tokens=max_new_tokens)]
    graded = grade(prompts, sampled, greedy, task.score, task.correct)
    items = [
        Item(
            id=each.prompt,
            values={
                "exact_match": each.right,
                "exact_match_greedy": float(each.right_greedily),
                "reward": sum(each.rewards) / samples,
            },
            shown={"prompt": each.prompt, "responses": each.sampled, "greedy": each.greedy, "rewards": each.rewards},
        )
        for each in graded
    ]
    made_by = {"data": f"world {made.model.parent.name}", "samples": samples, "temperature": "1, and 0 for greedy"}
    return Result(items, figures=graded_figures(graded), made=made_by)
