"""What is evaluated: a finished run or a model, asked for responses, log-probabilities or scores.

Whatever is generated is kept (`align_cli.responses`), so that an evaluation that was interrupted goes on where it was.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from align_cli import cache, config, distributed, generation, paths, references, rundir, terminal
from align_cli.assembly import find_manner
from align_cli.config import Tree
from align_cli.data.batches import Measured, split
from align_cli.data.records import Message, Record, RowError
from align_cli.data.store import Group
from align_cli.data.tokens import Template
from align_cli.engine import Measuring, Network, gpu_dtype
from align_cli.errors import UserError
from align_cli.models import adapters, causal, scalar
from align_cli.models.causal import Manner, Model
from align_cli.precision import choose_for
from align_cli.ranges import Count, WholeNumber
from align_cli.responses import Response, Responses, Sampling, digest_of
from align_cli.run import world_of
from align_cli.world import World

Prompt = str | Sequence[Message]
"""A text, which is encoded as it is, or messages, which the tokenizer's chat template writes."""

BUDGET = 4096  # tokens of a micro-batch that is measured
LOGITS_MB = 256  # of the chunks in which the head makes log-probabilities
CONTEXT = 8  # tokens of a prompt behind which a response is decoded
WRITING = (  # files beside the weights that decide what is written
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    "generation_config.json",
)
HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """The `generate` section: how a subject generates; the keys are explained in conf/evaluate.yaml."""

    batch: Count
    seed: WholeNumber
    precision: Literal["auto", "fp32", "bf16"]
    accelerator: Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A response as text, without special tokens and cut at the first stop string.

    Attributes:
        tokens: how many were generated, with the stop token.
        ended: whether it ended by itself, and not because it was cut at `max_new_tokens`.
        logprob: nats of all its tokens under the distribution that it was drawn from; 0 at temperature 0.
    """

    text: str
    tokens: int
    ended: bool
    logprob: float


class Subject:
    """A model that is evaluated; nothing is loaded before it is asked for.

    Attributes:
        name: as the user gave it.
        path: the model's folder, or its id on the hub.
        revision: commit or branch on the hub; None: the newest.
        run: the run directory that it is of; None for a model that is not a run.
        config: of that run.
        options: how it generates.
        device: where it computes.
    """

    def __init__(
        self,
        name: str,
        path: str,
        *,
        options: Generate,
        revision: str | None = None,
        run: Path | None = None,
        config: Tree | None = None,
    ):
        self.name = name
        self.path = path
        self.revision = revision
        self.run = run
        self.config = config
        self.options = options
        self.device = distributed.local_device(options.accelerator)
        self._templates: dict[Literal["chat", "text"], Template] = {}

    # --- what it is

    @cached_property
    def section(self) -> Model:
        """The model as a section of the configuration of training; of a run, with the run's own way of measuring."""
        own = Model(name="hf", path=self.path, revision=self.revision, rows="auto", head="auto", architecture=None)
        if self.config is None:
            return own
        begun = self.config["model"]
        return replace(own, rows=begun["rows"], head=begun["head"])

    @cached_property
    def base(self) -> Model:
        """The section of the model that holds the weights: below adapters the one that they were trained on."""
        if not self.adapted:
            return self.section
        from peft import PeftConfig

        adapters.refuse_other_formats(Path(self.path))
        told = PeftConfig.from_pretrained(self.path)
        return replace(self.section, path=str(told.base_model_name_or_path), revision=told.revision)

    @property
    def adapted(self) -> bool:
        """Whether the folder holds adapters."""
        return (Path(self.path) / "adapter_config.json").is_file()

    @cached_property
    def digest(self) -> str:
        """Of the weights."""
        base = references.digest_of(self.base)
        if not self.adapted:
            return base
        digest = hashlib.blake2b(base.encode(), digest_size=16)
        for name in ("adapter_config.json", adapters.WEIGHTS):
            digest.update(cache.file_digest(Path(self.path) / name, paths.cache() / "weights").encode())
        return digest.hexdigest()

    @cached_property
    def writing(self) -> str:
        """A digest of the files that say how texts become tokens and where a response ends.

        Nothing of a model of the hub, whose commit says it.
        """
        digest = hashlib.blake2b(digest_size=16)
        for folder in dict.fromkeys((Path(self.path), Path(self.base.path))):
            for file in (folder / name for name in WRITING):
                if file.is_file():
                    digest.update(f"{file.name} {cache.file_digest(file, paths.cache() / 'weights')}\n".encode())
        return digest.hexdigest()

    @cached_property
    def is_reward_model(self) -> bool:
        """Whether it scores responses and writes none."""
        if self.adapted:
            from peft import PeftConfig

            return PeftConfig.from_pretrained(self.path).task_type == "SEQ_CLS"
        return scalar.is_reward_model(causal.read_architecture(self.section))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own."""
        if not self.adapted:
            return causal.load_tokenizer(self.section)
        return causal.read_tokenizer(self.section)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        if self.options.precision != "auto":
            return torch.bfloat16 if self.options.precision == "bf16" else torch.float32
        if self.device.type == "cuda":
            return gpu_dtype()
        chosen = choose_for(causal.read_architecture(self.base), paths.cache())
        torch.set_float32_matmul_precision(chosen.products)
        return torch.bfloat16 if chosen.precision == "bf16" else torch.float32

    @property
    def bits(self) -> int | None:
        """Of the quantised weights that a run has trained adapters on, where a GPU computes with them."""
        if self.config is None or not self.adapted or self.device.type != "cuda":
            return None
        return self.config["adapter"]["bits"]

    @property
    def numerics(self) -> str:
        """What decides the rounding of what it computes."""
        kind = str(self.dtype).removeprefix("torch.") + (f"-{self.bits}bit" if self.bits is not None else "")
        if self.adapted and self.dtype != torch.float32:
            kind += "-unmerged"  # `adapters.worn`
        return f"{kind}-{self.device.type}-{torch.get_float32_matmul_precision()}"

    @cached_property
    def model(self) -> Network:
        """The language model, or reward model, on its device, with its adapters."""
        if self.is_reward_model:
            network = scalar.load_reward_model(self.base, dtype=self.dtype)
        else:
            network = causal.load_model(self.base, dtype=self.dtype, bits=self.bits)
        if self.adapted:
            network = adapters.worn(network, self.path, bits=self.bits)
        return network.to(self.device).eval()  # pyright: ignore[reportArgumentType]

    @property
    def measuring(self) -> Measuring:
        """The model with how it is measured."""
        return Measuring(self.model, self.device, manner=self.manner)

    @cached_property
    def manner(self) -> Manner:
        """How it is measured."""
        return find_manner(
            self.model,
            self.model,
            self.base,
            dtype=self.dtype,
            logits_mb=LOGITS_MB,
            device=self.device,
            scalar="scores" if self.is_reward_model else None,
        )

    def refuse_other_tokens(self, other: "Subject", key: str) -> None:
        """Refuse another model, named by `key`, for which the same token ids mean something else."""
        if other.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"{key}={other.name}: its tokenizer has other tokens than that of {self.name}; the same token ids "
                "would mean something else to it. Use a model of the same family."
            )

    # --- what it reads

    def template(self, prompt: Prompt) -> Template:
        """How a prompt of this kind becomes token ids.

        Raises:
            UserError: messages, and the tokenizer has no chat template.
        """
        kind: Literal["chat", "text"] = "text" if isinstance(prompt, str) else "chat"
        if kind == "chat" and not self.tokenizer.chat_template:
            raise UserError(
                f"{self.name}: its tokenizer has no chat template, which messages need. Use eval.template=text, where "
                "the evaluation has that, or a model with a template."
            )
        if kind not in self._templates:
            self._templates[kind] = Template(self.tokenizer, template=kind, system=None)
        return self._templates[kind]

    def encode(self, prompts: Sequence[Prompt]) -> list[NDArray[np.int32]]:
        """The token ids that a response to each prompt begins behind.

        Raises:
            UserError: one that the template cannot write, or longer than the model has positions.
        """
        return [group.prompt for group in self._groups([(prompt, ()) for prompt in prompts])]

    def _groups(self, asked: Sequence[tuple[Prompt, Sequence[str]]]) -> list[Group]:
        """Prompts with given responses as token ids; a response ends with the stop token."""
        found: list[Group] = []
        for index, (prompt, responses) in enumerate(asked):
            written = prompt if isinstance(prompt, str) else tuple(prompt)
            record = Record(written, tuple(responses), (0.0,) * len(responses), f"prompt {index}")
            [group] = self.template(prompt).tokenise([record])
            if isinstance(group, RowError):
                raise UserError(f"{self.name}: {record.where}: {group}")
            ratings = np.zeros(len(responses), dtype=np.float32)
            found.append(Group(index, group.prompt, group.responses, ratings, record.where))
        return found

    @cached_property
    def positions(self) -> int | None:
        """The longest sequence that the model was made for, in tokens; None where it does not say."""
        return causal.positions(causal.read_architecture(self.base))

    def _refuse_long(self, tokens: int, what: str) -> None:
        if self.positions is not None and tokens > self.positions:
            raise UserError(
                f"{self.name}: {what} has {tokens} tokens; the model has {self.positions} positions. Use fewer new "
                "tokens, fewer examples in the prompt, or a model with more positions."
            )

    # --- what it writes

    def refuse_reward_model(self) -> None:
        """Refuse to be asked for responses as a model that writes none."""
        if self.is_reward_model:
            raise UserError(f"{self.name}: a reward model, which writes no responses. Use a language model.")

    def ends(self, stops: Sequence[int]) -> list[int]:
        """The tokens that end a response: `stops`, and those that the tokenizer and the model name."""
        return list(dict.fromkeys([*stops, *generation.stops(self.model, self.tokenizer)]))

    def respond(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        temperature: float,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> list[list[str]]:
        """The texts of `sample`."""
        found = self.sample(prompts, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens, stop=stop)
        return [[each.text for each in drawn] for drawn in found]

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        temperature: float,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ) -> list[list[Sample]]:
        """`samples` responses to each prompt, in the order of `prompts`.

        A response depends on the weights, its prompt, these arguments, the seed and its number alone, up to the
        rounding of the logits; what was generated before is found again.

        Args:
            samples: K; at temperature 0 one is generated and given K times.
            temperature: divides the logits; 0 takes the most likely token.
            max_new_tokens: longest response, stop token included.
            stop: a response ends before the first of these texts, too.

        Raises:
            UserError: a prompt cannot be written, or is too long for the model.
        """
        ids = [each.tolist() for each in self.encode(prompts)]
        stops = [self.template(prompt).stop for prompt in prompts[:1]]
        drawn = self.draw(
            ids, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens, stop=stop, stops=stops
        )
        return [self.texts(prompt, found, stop) for prompt, found in zip(ids, drawn, strict=True)]

    def draw(
        self,
        prompts: Sequence[list[int]],
        *,
        samples: int,
        temperature: float,
        max_new_tokens: int,
        stop: Sequence[str],
        stops: Sequence[int],
    ) -> list[list[Response]]:
        """`sample` for prompts that are token ids already.

        Args:
            stops: tokens that end a response beside those that the model names.
        """
        self.refuse_reward_model()
        wanted = 1 if temperature == 0 else samples
        longest = max(map(len, prompts), default=0) + max_new_tokens
        self._refuse_long(longest, f"a prompt with max_new_tokens={max_new_tokens}")
        sampling = Sampling(
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            stop=list(stop),
            ends=list(stops),
            writing=self.writing,
            seed=self.options.seed if temperature else 0,
            numerics=self.numerics,
        )
        kept = Responses(paths.cache() / "responses", self.digest, sampling)
        names = [digest_of(each) for each in prompts]
        self._generate(kept, dict(zip(names, prompts, strict=True)), wanted, sampling, stops)
        found = [[kept.find(name, number) for number in range(wanted)] for name in names]
        whole = [[each for each in drawn if each is not None] for drawn in found]
        return [drawn * samples if wanted == 1 else drawn for drawn in whole]

    def _generate(
        self, kept: Responses, prompts: Mapping[str, list[int]], wanted: int, sampling: Sampling, stops: Sequence[int]
    ) -> None:
        """Have the first `wanted` responses to each prompt, by name."""
        lacking: dict[int, list[str]] = {}  # how many there are -> the prompts that have so many
        for name in sorted(prompts, key=lambda name: len(prompts[name])):
            there = next((number for number in range(wanted) if kept.find(name, number) is None), wanted)
            if there < wanted:
                lacking.setdefault(there, []).append(name)
        if not lacking:
            return
        eos_ids = self.ends(stops)
        of = sum(len(names) for names in lacking.values())
        done = 0
        with terminal.counter() as progress:
            for there, names in sorted(lacking.items()):
                asked = [prompts[name] for name in names]
                for drawn in self._draw(asked, there, wanted - there, sampling, eos_ids):
                    new = [(names[place], there + k, each) for place, every in drawn for k, each in enumerate(every)]
                    kept.add(new)
                    done += len(drawn)
                    progress("generating", done, of)

    def _draw(
        self, prompts: Sequence[list[int]], first: int, responses: int, sampling: Sampling, eos_ids: list[int]
    ) -> Iterator[list[tuple[int, list[Response]]]]:
        """Responses to each prompt, by its place, a batch at a time; a batch that memory has no room for is halved."""
        start, batch = 0, self.options.batch
        while start < len(prompts):
            places = range(start, min(len(prompts), start + max(1, batch // responses)))
            try:
                drawn = list(
                    generation.sample(
                        self.model,
                        [prompts[place] for place in places],
                        responses=responses,
                        max_new_tokens=sampling.max_new_tokens,
                        temperature=sampling.temperature,
                        seeds=[(sampling.seed, int(digest_of(prompts[place]), 16)) for place in places],
                        batch=batch,
                        pad_id=eos_ids[0],
                        eos_ids=eos_ids,
                        first=first,
                        halted=_halts(self.tokenizer, sampling.stop),
                    )
                )
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                drawn = None
            if drawn is None:  # outside of the block above, whose error holds on to what the batch has allocated
                batch //= 2
                torch.cuda.empty_cache()
                terminal.warn(f"memory is short: {batch} sequences are generated at a time; generate.batch sets it")
                continue
            yield [(places[index], [_response(each) for each in found]) for index, found in drawn]
            start = places.stop

    def texts(self, prompt: Sequence[int], found: Sequence[Response], stop: Sequence[str] = ()) -> list[Sample]:
        """Responses to a prompt, token ids, as text."""
        # Behind the end of the prompt: some tokenizers take the first space off whatever they decode.
        behind = list(prompt[-CONTEXT:])
        told = [behind, *([*behind, *each.tokens] for each in found)]
        asked, *whole = self.tokenizer.batch_decode(told, skip_special_tokens=True)
        texts = [text.removeprefix(asked) for text in whole]
        return [_cut(text, each, stop) for text, each in zip(texts, found, strict=True)]

    def room(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
        """The most new tokens of a response, where the model's positions leave fewer than is asked for."""
        if self.positions is None:
            return max_new_tokens
        left = self.positions - max(map(len, prompts), default=0)
        if left < 1:
            raise UserError(
                f"{self.name}: a prompt has {self.positions - left} tokens, the model {self.positions} positions; "
                "data.max_length drops or shortens prompts that leave no room."
            )
        return min(max_new_tokens, left)

    # --- what it says of given responses

    def scores(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """What the reward model gives to each (prompt, response); prompts with several responses are read once.

        Raises:
            UserError: it is not a reward model.
        """
        if not self.is_reward_model:
            raise UserError(f"{self.name}: not a reward model; use one that algo=bradley_terry makes.")
        places: dict[str, list[int]] = {}
        for place, (prompt, _) in enumerate(pairs):
            places.setdefault(json.dumps(prompt), []).append(place)
        together = list(places.values())
        groups = self._groups([(pairs[same[0]][0], [pairs[place][1] for place in same]) for same in together])
        found: dict[int, float] = {}
        for same, row in zip(together, self.measure(groups, "scores"), strict=True):
            found |= dict(zip(same, row.tolist(), strict=True))
        return [found[place] for place in range(len(pairs))]

    @torch.no_grad()
    def measure(self, groups: Sequence[Group], column: str) -> list[torch.Tensor]:
        """A column that `align_cli.models.causal.measure` gives, of each group, fp32 on the CPU: (K,) or (K, T)."""
        longest = max((len(each.prompt) + max(map(len, each.responses)) for each in groups), default=0)
        self._refuse_long(longest, "a prompt with its response")
        lengths = self.manner.lengths(Measured.of(groups))
        parts = split(range(len(groups)), lengths, ranks=1, budget=BUDGET)[0] if groups else []
        found: dict[int, torch.Tensor] = {}
        with terminal.counter() as progress:
            for done, part in enumerate(parts, start=1):
                batch = self.manner.flatten([groups[index] for index in part.groups]).to(self.device)
                measured = causal.measure(self.model, batch, self.manner)[column].float().cpu()
                found |= dict(zip(part.groups, measured, strict=True))
                progress("measuring", done, len(parts))
        return [found[index] for index in range(len(groups))]


def _response(drawn: generation.Drawn) -> Response:
    return Response(drawn.tokens, drawn.ended, math.fsum(drawn.logprobs))


def _halts(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> generation.Halted | None:
    """Whether one of the texts `stop` is in the newest tokens of a response."""
    if not stop:
        return None
    newest = max(len(text.encode()) for text in stop) + generation.LOOK  # a token has a byte or more

    def halted(responses: list[list[int]]) -> list[bool]:
        ends = tokenizer.batch_decode([tokens[-newest:] for tokens in responses])
        return [any(text in end for text in stop) for end in ends]

    return halted


def _cut(text: str, response: Response, stop: Sequence[str]) -> Sample:
    """A response's text up to the first of the texts `stop`."""
    ends = [place for place in (text.find(each) for each in stop) if place >= 0]
    kept = text[: min(ends)] if ends else text
    return Sample(kept, len(response.tokens), response.ended or bool(ends), response.logprob)


# --- from what the user gave


def find(name: str, options: Generate) -> Subject:
    """The run or model that a name means: a run directory, a model's folder, a choice of conf/model, or a hub id.

    Raises:
        UserError: there is no such thing, or the run has not finished.
    """
    transformers_logging.disable_progress_bar()
    path = Path(name).expanduser()
    if (path / rundir.CONFIG).is_file():
        return of_run(name, path, options)
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise UserError(
                f"{name}: neither a run directory (it has no {rundir.CONFIG}) nor a model (it has no config.json)."
            )
        return Subject(name, str(path), options=options)
    choices = config.group_names()["model"]
    if name in choices and name != "hf":
        tree = config.compose("train", [f"model={name}"])
        return Subject(name, start_of(tree), options=options, revision=tree["model"]["revision"])
    if path.exists() or not HUB.fullmatch(name) or name.startswith("."):
        raise UserError(f"{name}: there is no such run directory or model's folder (seen from {Path.cwd()}).")
    found = Subject(name, name, options=options)
    try:
        causal.read_architecture(found.section)
    except UserError as error:
        near = config.did_you_mean(name, [each for each in choices if each != "hf"])
        raise UserError(
            f"{name}: there is no such folder (seen from {Path.cwd()}), and no such model of the hub can be "
            f"read.{near} Use a run directory, a model's folder, a hub id, or one of `align ls model`."
        ) from error
    return found


def of_run(name: str, path: Path, options: Generate) -> Subject:
    """The model that a finished run has made.

    Raises:
        UserError: it has not finished.
    """
    tree = rundir.read_config(path)
    if rundir.read_summary(path) is None or not (path / "model").is_dir():
        using = rundir.holder(path)
        state = f"in use by {using}" if using else "not finished"
        raise UserError(
            f"{name}: the run is {state}, and has no model yet; its checkpoints are for resuming it. align train with "
            "the same configuration goes on to the end; then it can be evaluated."
        )
    return Subject(name, str(path / "model"), options=options, run=path, config=tree)


def start_of(tree: Tree) -> str:
    """The folder or hub id of the model that a run of this configuration starts from."""
    path = tree["model"]["path"]
    return path if path != "world" else str(world_of(World(**tree["world"]), terminal.say).model)
