"""Secrets are refused on the command line and struck out of records; ordinary options pass."""

import pytest

from align_cli.errors import UserError
from align_cli.secrets import redact, refuse_secrets

SECRET = [
    "wandb.api_key=0123",
    "+judge.apiKey=0123",
    "++hub_token=abc",
    "model.token=abc",
    "token=abc",
    "--password=hunter2",
    "db.passphrase=x",
    "client_secret=x",
    "secrets.mine=x",
    "aws.credentials=x",
    "aws_access_key=x",
    "data.options={api_key: 0123}",
    "data.options={path: a, hub_token: 0123}",
    "model.path=hf_" + "a" * 34,
    "data.note=sk-" + "A1" * 20,
    "data.path=https://me:hunter2@example.org/rows.jsonl",
]
PLAIN = [
    "algo=nca",
    "data.path=rows.jsonl",
    "train.max_new_tokens=128",
    "prompt_tokens=512",
    "data.tokens_per_step=4096",
    "model.pad_token=<pad>",
    "tokenizer.eos_token=</s>",
    "eval.per_token=true",
    "data.prompt_key=question",
    "data.path=s3://bucket/rows",
    "data.fields={prompt: question, chosen: best}",
    "algo.beta=0.1,0.2",
    "-m",
    "--cfg",
    "~track",
    "model.path=mistralai/Mistral-7B-v0.1",
]


@pytest.mark.parametrize("argument", SECRET)
def test_a_secret_is_refused_without_being_repeated(argument: str) -> None:
    with pytest.raises(UserError, match="environment instead") as caught:
        refuse_secrets(["algo=nca", argument])
    for value in ("0123", "abc", "hunter2", "a" * 20, "A1A1"):
        assert value not in str(caught.value)


@pytest.mark.parametrize("argument", PLAIN)
def test_an_ordinary_option_passes(argument: str) -> None:
    refuse_secrets([argument])
    assert redact([argument]) == [argument]


def test_a_record_of_the_command_line_holds_no_secret() -> None:
    struck = redact(["align", "train", *SECRET])
    assert struck[:2] == ["align", "train"]
    assert all(argument.endswith("=***") for argument in struck[2:])
