"""Runs that take a second: a language model of 30,000 random weights, and a few rows of the addition task."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from align_cli import cli, config, exits, reading
from align_cli.data import toy
from align_cli.data.store import Group
from align_cli.experiment import Experiment
from align_cli.models import tiny
from align_cli.tracking import read_metrics

ROWS = Path(__file__).parent / "data" / "rows"
SETTINGS = (
    "model=hf",
    "data=file",
    "data.template=text",
    "data.held_out=6",
    "train.steps=20",
    "train.prompts=4",
    "train.lr=1e-3",
    "track=none",
    "launch.accelerator=cpu",
)


def build_model(folder: Path, *, seed: int) -> Path:
    """A tiny Llama that knows the characters of the addition task."""
    tiny.build(folder, alphabet=toy.ALPHABET, hidden=32, layers=2, heads=2, positions=128, seed=seed)
    return folder


def write_rows(path: Path, *, responses: Sequence[int], rows: int) -> Path:
    """JSONL of problems with distinct scored completions; their numbers go round in `responses`."""
    rng = random.Random(0)
    lines: list[str] = []
    for place, prompt in zip(range(rows), toy.problems(0, 2), strict=False):
        completions: list[str] = []
        while len(completions) < responses[place % len(responses)]:
            text = toy.demonstrate(prompt, toy.behaviour(rng), rng)
            if text not in completions:
                completions.append(text)
        # no two responses of a prompt are equally good
        rewards = [toy.score(prompt, text) + 0.001 * k for k, text in enumerate(completions)]
        lines.append(json.dumps({"prompt": prompt, "completions": completions, "rewards": rewards}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_few_rows(folder: Path) -> Path:
    """Five rows of each dataset that the recipes train on, <name>.jsonl."""
    for name in ("ultrafeedback", "ultrafeedback_h4", "ultrainteract", "hh", "tldr", "imdb", "prompt"):
        first = json.loads((ROWS / f"{name}.jsonl").read_text().splitlines()[0])
        rows = [json.dumps(_varied(first, number)) for number in range(1, 6)]
        (folder / f"{'file' if name == 'prompt' else name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def _varied(value: Any, number: int) -> Any:
    """A row with other prompts and responses, told apart by the o in them; what names its parts has none."""
    if isinstance(value, dict):
        return {key: _varied(each, number) for key, each in value.items()}
    if isinstance(value, list):
        return [_varied(each, number) for each in value]
    return value.replace("o", "o" * number) if isinstance(value, str) else value


def overrides(model: Path, rows: Path, run_dir: Path, *more: str) -> list[str]:
    """The command line of a small run, without `align train`."""
    return [*SETTINGS, f"model.path={model}", f"data.path={rows}", f"run.dir={run_dir}", *more]


def align(*arguments: str) -> int:
    """The command `align` in this process; returns its exit code."""
    return exits.guarded(lambda: cli.dispatch(list(arguments)))


def read(given: Sequence[str]) -> Experiment:
    """The experiment that overrides describe."""
    return reading.read(config.compose("train", given))


def summary(run_dir: Path) -> dict[str, Any]:
    """The final figures of a run."""
    return json.loads((run_dir / "summary.json").read_text())


def losses(run_dir: Path) -> list[float]:
    """The loss of each step, whose lines must be 1, 2, 3, ..."""
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def weights(run_dir: Path) -> dict[str, Tensor]:
    """The weights that a run ends with; those of the adapter where it has one."""
    (file,) = (run_dir / "model").glob("*.safetensors")
    return load_file(file)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Between two models of the same parameters."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@torch.no_grad()
def logprobs(model: Path, group: Group) -> list[float]:
    """log π(y_k|x) of a group, each response computed alone by transformers, in float64."""
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    found: list[float] = []
    for response in group.responses:
        ids = torch.tensor([[*group.prompt.tolist(), *response.tolist()]])
        every = network(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        found.append(float(every[len(group.prompt) - 1 :].sum()))
    return found


def build_reader(folder: Path, *, seed: int, hidden: int = 32, family: str = "llama") -> Path:
    """A tiny model of random weights that reads any text, byte by byte, and chats in a plain template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    begin = [("<s>", vocabulary["<s>"])]
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=begin)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}"
        "{{ eos_token if turn['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    torch.manual_seed(seed)
    shape = AutoConfig.for_model(
        family,
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
