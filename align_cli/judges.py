"""The `judge` group: a model behind an OpenAI-compatible endpoint that says what it thinks of responses.

Address, key and, unless the configuration names it, the model come from the environment; a key never comes from the
configuration. What a judge has answered is kept on disk, found by the messages and by everything that decides the
answer, so that nothing is paid for twice.
"""

import datetime
import email.utils
import json
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from align_cli import paths, terminal
from align_cli.data.records import Message
from align_cli.errors import RunError, UserError
from align_cli.journal import Journal, name_of
from align_cli.ranges import Count, NonNegative, NotEmpty, Positive, WholeNumber

URLS = ("ALIGN_JUDGE_URL", "OPENAI_BASE_URL")
KEYS = ("ALIGN_JUDGE_KEY", "OPENAI_API_KEY")
MODEL = "ALIGN_JUDGE_MODEL"
OPENAI = "https://api.openai.com/v1"

BYTES_PER_TOKEN = 4  # of UTF-8; English takes a little more with the tokenizers in use
TOKENS_PER_MESSAGE = 8  # role and separators
LONGEST_WAIT = 60.0  # seconds between two tries where the server does not say when to come again
HOPELESS = 8  # requests that are refused before any was answered

Limit = Literal["max_tokens", "max_completion_tokens"]


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is, and what opens it.

    Attributes:
        url: up to the part that the SDK adds (`/chat/completions`).
        key: None where the server wants none.
    """

    url: str
    key: str | None = field(repr=False)

    @property
    def host(self) -> str:
        """Host and port, without a login that may stand before them."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    @property
    def where(self) -> str:
        """Host, port and path."""
        return f"{self.host}{urlsplit(self.url).path.rstrip('/')}"


def endpoint() -> Endpoint:
    """The endpoint that the environment names; without an address, OpenAI's.

    OPENAI_API_KEY is not sent to an address of ALIGN_JUDGE_URL, which may be anybody's.

    Raises:
        UserError: the address is none, or OpenAI's key is missing.
    """
    own, usual = (os.environ.get(name, "").strip() for name in URLS)
    url = own or usual or OPENAI
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{URLS[0] if own else URLS[1]}={url}: use an address such as http://127.0.0.1:8000/v1.")
    names = KEYS[:1] if own else KEYS
    key = next(filter(None, (os.environ.get(name, "").strip() for name in names)), None)
    if key is None and url == OPENAI:
        raise UserError(
            f"a judge needs an address and a key from the environment: {URLS[0]} and {KEYS[0]}, or {KEYS[1]} alone for "
            f"{parts.hostname}; a server of one's own on {URLS[0]}=http://127.0.0.1:8000/v1 needs no key."
        )
    if key is not None and not (key.isascii() and key.isprintable()):
        raise UserError("the judge's key holds what no header can: use plain ASCII characters.")
    if key is not None and parts.scheme == "http" and not _is_loopback(parts.hostname):
        terminal.warn(f"the judge's key goes to {parts.hostname} unencrypted; use an https address")
    return Endpoint(url, key)


def asked_for(section: Mapping[str, Any]) -> dict[str, Any]:
    """What a section `judge` and the environment together decide: whose verdicts an evaluation rests on."""
    return {**section, "model": model_of(section), "where": endpoint().where}


def model_of(section: Mapping[str, Any]) -> str:
    """The model that a section `judge` names, or else the environment; empty where neither does."""
    return section["model"] or os.environ.get(MODEL, "").strip()


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


@dataclass(frozen=True)
class Answer:
    """What a judge said.

    Attributes:
        text: None where the endpoint refused the question.
        finish: why it ended, as the server says: "stop", "length", ...; why it was refused, where it was.
        model: as the server names it; empty where it was refused.
        date: of the answer, UTC, 2026-11-21; empty where it was refused.
    """

    text: str | None
    finish: str
    model: str
    date: str

    @property
    def whole(self) -> str | None:
        """The text, unless it was refused or cut at the limit of tokens, where what it ends with means nothing."""
        return self.text if self.finish != "length" else None


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a judge is asked: what decides its answers.

    Attributes:
        temperature: None: the server's own.
        limit: the name under which the server takes `max_tokens`.
    """

    model: str
    temperature: float | None
    max_tokens: int
    limit: Limit

    @property
    def told(self) -> dict[str, Any]:
        """The fields of a request beside its messages."""
        drawn = {} if self.temperature is None else {"temperature": self.temperature}
        return {"model": self.model, self.limit: self.max_tokens, **drawn}


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Dollars for a million tokens in and out; None where they are not known.

    Attributes:
        most: dollars that may be spent; None: any.
    """

    given: float | None
    made: float | None
    most: float | None

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """Dollars; None where the prices are not known."""
        if self.given is None or self.made is None:
            return None
        return (tokens_in * self.given + tokens_out * self.made) / 1e6


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a judge is asked for.

    Attributes:
        retries: tries after the first.
        first: seconds before the second try; each further wait is twice as long, up to a minute.
        longest: seconds that are waited where the server names a time; beyond it the evaluation stops.
        timeout: seconds for one answer.
    """

    retries: int
    first: float
    longest: float
    timeout: float


class _Halt(Exception):
    """Why nothing more can be asked."""

    def __init__(self, sentence: str, *, mistake: bool) -> None:
        super().__init__(sentence)
        self.mistake = mistake


@dataclass
class _Gate:
    """When the next request may go out: a server that asks to wait is left alone by every thread."""

    until: float = 0.0  # on the monotonic clock, as all times here
    told: bool = False
    answered: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def close(self, seconds: float, why: str, sent: float) -> None:
        """Let nothing through for so long; says so once until an answer comes, and again only for what is sent then.

        Args:
            sent: when the request was let through that was turned away.
        """
        with self.lock:
            self.until = max(self.until, time.monotonic() + seconds)
            news = not self.told and sent >= self.answered
            self.told = self.told or news
        if news:
            terminal.say(f"{why}, waiting {math.ceil(seconds)} s")

    def open(self) -> None:
        """An answer came."""
        with self.lock:
            self.told = False
            self.answered = time.monotonic()

    def pass_through(self, stopping: threading.Event) -> float:
        """Wait until requests may go out, or until nothing more is asked; returns when that was."""
        while (left := self.until - (now := time.monotonic())) > 0 and not stopping.is_set():
            stopping.wait(left)
        return now


class Judge:
    """Asks a model behind an OpenAI-compatible endpoint; the keys are explained in conf/judge/openai.yaml.

    Raises:
        UserError: the SDK is not installed, the environment lacks something, or a limit of unknown prices is given.
    """

    def __init__(
        self,
        *,
        name: Literal["openai"],
        model: NotEmpty | None,
        temperature: NonNegative | None,
        max_tokens: Count,
        limit: Limit,
        concurrency: Count,
        retries: WholeNumber,
        backoff: Positive,
        patience: Positive,
        timeout: Positive,
        price_in: NonNegative | None,
        price_out: NonNegative | None,
        max_cost: NonNegative | None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("a judge is asked through the package openai: pip install 'align-cli[eval]'.") from error
        self._sdk = openai
        self.at = endpoint()
        named = model or os.environ.get(MODEL, "").strip()
        if not named:
            raise UserError(f"no model judges: set judge.model=NAME or {MODEL}=NAME.")
        if max_cost is not None and (price_in is None or price_out is None):
            raise UserError(
                f"judge.max_cost={max_cost:g} needs prices: set judge.price_in and judge.price_out, dollars for a "
                "million tokens."
            )
        self.manner = Manner(model=named, temperature=temperature, max_tokens=max_tokens, limit=limit)
        self.prices = Prices(given=price_in, made=price_out, most=max_cost)
        self.patience = Patience(retries=retries, first=backoff, longest=patience, timeout=timeout)
        self.concurrency = concurrency
        self._gate = _Gate()
        self._lock = threading.Lock()
        self._spent = 0.0  # dollars, and what is reserved for requests under way
        self._answered = 0
        self._refused: Counter[str] = Counter()
        self.journal = Journal(
            paths.cache() / "judgments" / f"{name_of(self.manner_of_asking)[:16]}.jsonl",
            costs="answers of the judge are kept for this evaluation alone",
        )

    @property
    def label(self) -> str:
        """Model and host, as they are asked for."""
        return f"{self.manner.model}@{self.at.host}"

    @property
    def manner_of_asking(self) -> dict[str, Any]:
        """Everything beside the messages that decides an answer."""
        return {"where": self.at.where, **self.manner.told}

    def ask(self, prompts: Sequence[Sequence[Message]]) -> list[Answer]:
        """The judge's answer to each prompt; equal prompts are asked once, ever.

        What it will cost is said before anything is asked. Each answer is kept as soon as it comes, whatever happens
        to the others.

        Raises:
            UserError: the endpoint knows no such model, or does not take the key.
            RunError: it cannot be reached, refuses everything, or asks to wait for too long; or `max_cost` is reached.
        """
        self.journal.refresh()
        names = [self._name(prompt) for prompt in prompts]
        missing = {name: prompt for name, prompt in zip(names, prompts, strict=True) if name not in self.journal}
        refused: dict[str, Answer] = {}
        if missing:
            terminal.say(self.estimate(list(missing.values()), kept=len(set(names)) - len(missing)))
            refused = self._ask_all(missing)
        return [refused[name] if name in refused else self._kept(name) for name in names]

    def _name(self, prompt: Sequence[Message]) -> str:
        return name_of({"messages": list(prompt), **self.manner_of_asking})

    def _kept(self, name: str) -> Answer:
        kept = self.journal[name]
        return Answer(kept["text"], kept["finish"], kept["model"], kept["date"])

    def estimate(self, prompts: Sequence[Sequence[Message]], *, kept: int) -> str:
        """A sentence on what asking will cost at least and at most.

        Args:
            kept: answers that are known.
        """
        given = sum(map(tokens, prompts))
        made = len(prompts) * self.manner.max_tokens
        known = f", {kept:,} more are known" if kept else ""
        least, most = self.prices.cost(given, 0), self.prices.cost(given, made)
        price = (
            "its prices are not known (judge.price_in, judge.price_out)"
            if least is None
            else f"between ${least:,.2f} and ${most:,.2f}"
        )
        return (
            f"asking {self.label}: {len(prompts):,} requests{known}; about {given:,} tokens in "
            f"({BYTES_PER_TOKEN} bytes each), at most {made:,} out: {price}"
        )

    # --- asking

    def _ask_all(self, missing: dict[str, Sequence[Message]]) -> dict[str, Answer]:
        """Ask what is not known; returns what was refused."""
        stopping = threading.Event()
        client = self._sdk.OpenAI(
            base_url=self.at.url,
            api_key=self.at.key or "none",  # the SDK wants one; servers that need none ignore it
            max_retries=0,
            timeout=self.patience.timeout,
        )
        refused: dict[str, Answer] = {}
        before = len(self.journal)

        def one(name: str, prompt: Sequence[Message]) -> None:
            try:
                answer = self._asked(client, name, prompt, stopping)
            except _Halt:
                stopping.set()
                raise
            if answer is not None:
                refused[name] = answer

        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        try:
            futures = {pool.submit(one, name, prompt) for name, prompt in missing.items()}
            with terminal.counter() as count:
                left = futures
                while left:
                    done, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
                    count(f"asking {self.manner.model}", len(futures) - len(left), len(futures))
                    for future in done:
                        future.result()
        except _Halt as halt:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            got = len(self.journal) - before
            kept = f" {got:,} of {len(missing):,} answers have come and are kept; the same command goes on from there."
            kind = UserError if halt.mistake else RunError
            raise kind(f"{halt}{kept if got else ''}") from halt
        finally:
            stopping.set()
            client.close()  # an interrupt does not wait for answers
            pool.shutdown(cancel_futures=True)
        return refused

    def _asked(self, client: Any, name: str, prompt: Sequence[Message], stopping: threading.Event) -> Answer | None:
        """Ask one question until it is answered, and keep the answer; returns why the endpoint refused it instead."""
        given = tokens(prompt)
        for attempt in range(self.patience.retries + 1):
            sent = self._gate.pass_through(stopping)
            if stopping.is_set():
                return None
            reserved = self._reserve(given)
            usage: tuple[int, int] | None = None
            try:
                value, usage = self._request(client, prompt, given)
            except self._sdk.APIError as error:
                if stopping.is_set():
                    return None
                reason = self._give_up(error, attempt, sent)
                if reason is not None:
                    return self._refuse(reason)
                continue
            finally:
                spent = 0.0 if usage is None else self.prices.cost(*usage) or 0.0
                with self._lock:
                    self._spent += spent - reserved
            if value is None:
                return self._refuse("the answer has no choices")
            self._gate.open()
            with self._lock:
                self._answered += 1
            self.journal.add(name, value)
            return None
        raise AssertionError("the last try is given up or answered")

    def _request(
        self, client: Any, prompt: Sequence[Message], given: int
    ) -> tuple[dict[str, str] | None, tuple[int, int]]:
        """One request: what is kept of the answer, None where it has none; and the tokens in and out."""
        raw = client.chat.completions.with_raw_response.create(messages=list(prompt), **self.manner.told)
        try:
            told = json.loads(raw.http_response.text)
            choice = told["choices"][0]
            text, finish, model = choice["message"]["content"], choice["finish_reason"], told["model"]
        except (ValueError, KeyError, IndexError, TypeError):  # a page of something else, or an error with status 200
            return None, (given, 0)
        counted = told.get("usage") if isinstance(told.get("usage"), dict) else {}
        text = text if isinstance(text, str) else ""  # a refusal of the model's own, or all tokens went into reasoning
        made = counted.get("completion_tokens")
        read = counted.get("prompt_tokens")
        usage = read if isinstance(read, int) else given, made if isinstance(made, int) else self.manner.max_tokens
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        return {"text": text, "finish": str(finish), "model": str(model), "date": today}, usage

    def _reserve(self, given: int) -> float:
        """Set aside what a request costs at most, so that requests under way at once do not exceed the limit."""
        cost = self.prices.cost(given, self.manner.max_tokens) or 0.0
        most = self.prices.most
        with self._lock:
            if most is not None and self._spent + cost > most:
                raise _Halt(
                    f"judge.max_cost={most:g} would be exceeded: ${self._spent:.4f} is spent or under way, another "
                    f"request may cost ${cost:.4f}.",
                    mistake=True,
                )
            self._spent += cost
        return cost

    def _refuse(self, reason: str) -> Answer:
        with self._lock:
            self._refused[reason] += 1
            hopeless = not self._answered and self._refused.total() >= HOPELESS
        if hopeless:
            raise _Halt(f"the judge {self.label} refuses everything: {reason}.", mistake=True)
        return Answer(None, reason, "", "")

    # --- errors

    def _give_up(self, error: Exception, attempt: int, sent: float) -> str | None:
        """Close the gate before another try, or say why this question is refused.

        Raises:
            _Halt: no other question would fare better.
        """
        last = attempt == self.patience.retries
        wait = min(LONGEST_WAIT, self.patience.first * 2**attempt) * random.uniform(0.75, 1)
        sdk = self._sdk
        if isinstance(error, sdk.APIStatusError):
            return self._answered_with(error, wait, sent, last=last)
        if isinstance(error, sdk.APITimeoutError):
            why = f"{self.at.host} gives no answer within {self.patience.timeout:g} s"
        elif isinstance(error, sdk.APIConnectionError):
            why = f"the judge at {self.at.host} cannot be reached ({_cause(error)})"
            last = last or (not self._answered and attempt > 0)  # an address that is wrong stays so
        else:
            return _cause(error)
        if last:
            raise _Halt(f"{why}; {URLS[0]} names the address.", mistake=False)
        self._gate.close(wait, why, sent)
        return None

    def _answered_with(self, error: Any, wait: float, sent: float, *, last: bool) -> str | None:
        status, reason = error.status_code, _message(error)
        if status in (401, 403):
            raise _Halt(
                f"{self.at.host} does not take the key ({status}: {reason}); set the right one in {KEYS[0]}.",
                mistake=True,
            )
        if status == 404:
            raise _Halt(
                f"{self.at.where} has no such model or address ({reason}): judge.model={self.manner.model}.",
                mistake=True,
            )
        if status == 429 and error.code == "insufficient_quota":  # waiting does not help
            raise _Halt(f"{self.at.host} has no quota left: {reason}.", mistake=False)
        if status not in (408, 409, 425, 429) and status < 500:
            return f"{status}: {reason}"
        named = retry_after(error.response.headers)
        if named is not None and named > self.patience.longest:
            raise _Halt(
                f"{self.at.host} asks to wait {named:.0f} s, longer than judge.patience={self.patience.longest:g}.",
                mistake=False,
            )
        if last:
            raise _Halt(
                f"{self.at.host} answers {status} ({reason}) after {self.patience.retries} retries; "
                "judge.concurrency=1 asks less at once.",
                mistake=False,
            )
        busy = "rate limited" if status == 429 else f"{self.at.host} answers {status}"
        self._gate.close(wait if named is None else named, busy, sent)
        return None


def tokens(prompt: Sequence[Message]) -> int:
    """About how many tokens a prompt has."""
    size = sum(len(message["content"].encode(errors="replace")) for message in prompt)
    return math.ceil(size / BYTES_PER_TOKEN) + TOKENS_PER_MESSAGE * len(prompt)


def retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait: `Retry-After` as a number or a date (RFC 9110, 10.2.3); None: it does not."""
    told = headers.get("retry-after")
    if told is None:
        return None
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(told).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _message(error: Any) -> str:
    """What the server says of an error, in one line."""
    body = error.body
    told = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(told or error.message).split())[:200]


def _cause(error: BaseException) -> str:
    """The innermost reason of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__


def identity(judge: Judge, answers: Sequence[Answer], template: str) -> dict[str, str]:
    """Who judged, when and by which words: part of every judged number.

    Args:
        template: the digest of the prompt.
    """
    heard = [answer for answer in answers if answer.text is not None]
    models = sorted({answer.model for answer in heard}) or [judge.manner.model]
    dates = sorted({answer.date for answer in heard})
    return {
        "judge": f"{'+'.join(models)}@{judge.at.host}",
        "judge_date": dates[0] if len(dates) == 1 else " to ".join([dates[0], dates[-1]]) if dates else "never",
        "judge_template": template,
        "judge_temperature": "the server's" if judge.manner.temperature is None else f"{judge.manner.temperature:g}",
        "judge_max_tokens": str(judge.manner.max_tokens),
    }
