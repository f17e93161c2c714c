"""Secrets come from the environment only. On the command line they would end up in process lists, logs and records."""

import re
from collections.abc import Sequence

from align_cli.errors import UserError

# Words that make a name secret wherever they stand in it.
_ALWAYS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
# `token` and `key` are also ordinary words here (pad_token, prompt_tokens, per_token): they count as the last word
# of a name, and `key` only after one of these.
_KEYS = {"access", "api", "auth", "encryption", "hf", "hub", "private", "signing", "ssh", "wandb"}
_PLAIN_TOKENS = {"begin", "bos", "cls", "end", "eos", "mask", "new", "pad", "per", "sep", "special", "stop", "unk"}

# What the keys of services look like, whatever name they are given under.
_SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|wandb_v1_\w{20,}"
    r"|AKIA[A-Z0-9]{16})"
)
_LOGIN_IN_ADDRESS = re.compile(r"://[^/\s:@]+:[^/\s@]+@")
_NAMES_INSIDE = re.compile(r"([A-Za-z_][\w.-]*)['\"]?\s*[:=]")


def is_secret(name: str) -> bool:
    """Whether an option of this name would hold a secret: `wandb.api_key` does, `train.max_new_tokens` does not."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    if _ALWAYS & set(re.split(r"[^a-z0-9]+", words)):
        return True
    *before, last = re.split(r"[^a-z0-9]+", re.split(r"[./]", words)[-1])
    if last == "token":
        return not before or before[-1] not in _PLAIN_TOKENS
    return last == "key" and (not before or before[-1] in _KEYS)


def _holds(argument: str) -> str | None:
    """What makes an argument secret, in words that do not repeat it; None where nothing does."""
    name, _, value = argument.partition("=")
    names = [name.lstrip("+~-").split("@")[0]]
    if value.lstrip().startswith(("{", "[")):
        names += _NAMES_INSIDE.findall(value)
    for candidate in names:
        if is_secret(candidate):
            return f"'{candidate}' names a secret"
    if _SHAPES.search(argument):
        return f"the value of '{names[0]}' looks like a service's key" if value else "an argument looks like a key"
    if _LOGIN_IN_ADDRESS.search(argument):
        return f"the address in '{names[0]}' contains a password" if value else "an address contains a password"
    return None


def refuse_secrets(argv: Sequence[str]) -> None:
    """Refuse a command line that holds a secret.

    Raises:
        UserError: says which argument, without its value.
    """
    for argument in argv:
        held = _holds(argument)
        if held is not None:
            raise UserError(
                f"{held}, and a command line can be read by others and is recorded; "
                "give it in the environment instead (WANDB_API_KEY, HF_TOKEN)"
            )


def redact(argv: Sequence[str]) -> list[str]:
    """The command line as it may be recorded: what `refuse_secrets` would refuse loses its value."""
    return [
        argument if _holds(argument) is None else f"{argument.partition('=')[0]}=***" if "=" in argument else "***"
        for argument in argv
    ]
