"""A judge behind a scripted endpoint: what is asked, kept, waited for, paid and refused."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from scripted_judge import Reply, Request, judge, scripted

from align_cli import config, judges, paths
from align_cli.data.records import Message
from align_cli.errors import RunError, UserError
from align_cli.judges import Answer, Judge

pytest.importorskip("openai", reason="the extra 'eval' is not installed")

pytestmark = pytest.mark.usefixtures("no_judge")

CHOICES = sorted(path.stem for path in (paths.conf() / "judge").glob("*.yaml"))


def questions(count: int) -> list[list[Message]]:
    return [[{"role": "user", "content": f"question {number}"}] for number in range(count)]


def texts(answers: Sequence[Answer]) -> list[str | None]:
    return [answer.text for answer in answers]


def echo(request: Request) -> str:
    return f"to {request['messages'][0]['content']}"


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_is_what_the_code_takes(choice: str) -> None:
    node = yaml.safe_load((paths.conf() / "judge" / f"{choice}.yaml").read_text())
    assert config.check(Judge, node, "judge") == []


def test_answers_come_in_the_order_of_the_questions_and_are_asked_once_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(echo) as server:
        first = judge(server.url, monkeypatch).ask([*questions(5), *questions(2)])
        assert texts(first) == [f"to question {n}" for n in (0, 1, 2, 3, 4, 0, 1)]
        assert len(server.asked) == 5
        assert judge(server.url, monkeypatch).ask(questions(5)) == first[:5]
        assert len(server.asked) == 5
        judge(server.url, monkeypatch, temperature=0.5).ask(questions(1))
        assert len(server.asked) == 6, "another manner of asking is another question"
    assert first[0].model == "served-name" and len(first[0].date) == 10


def test_the_request_is_what_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(echo) as server:
        judge(server.url, monkeypatch, max_tokens=7).ask(questions(1))
        judge(server.url, monkeypatch, temperature=None, limit="max_completion_tokens").ask(questions(1))
        assert server.keys == ["Bearer none", "Bearer none"]
    assert [{**request, "messages": None} for request in server.asked] == [
        {"model": "judge-1", "messages": None, "max_tokens": 7, "temperature": 0.0},
        {"model": "judge-1", "messages": None, "max_completion_tokens": 1024},
    ]


def test_a_rate_limit_is_waited_for_as_long_as_the_server_says_and_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limited: list[float] = []

    def answer(request: Request) -> Reply | str:
        if len(limited) < 4:
            limited.append(time.monotonic())
            return Reply(status=429, headers={"retry-after": "0.4"}, body='{"error": {"message": "slow down"}}')
        limited.append(time.monotonic())
        return echo(request)

    with scripted(answer) as server:
        found = judge(server.url, monkeypatch).ask(questions(2))
    assert texts(found) == ["to question 0", "to question 1"]
    assert limited[2] - limited[0] >= 0.4
    assert capsys.readouterr().err.count("rate limited, waiting 1 s") == 1


def test_a_refusal_that_arrives_late_is_no_second_wait(capsys: pytest.CaptureFixture[str]) -> None:
    """Its request went out before an answer came to another: it is left alone, and one that goes out after is not."""
    gate, going = judges._Gate(), threading.Event()
    first = gate.pass_through(going)
    gate.close(0.0, "rate limited", first)
    gate.open()
    gate.close(0.0, "rate limited", first)
    assert capsys.readouterr().err.count("rate limited") == 1
    gate.close(0.0, "rate limited", gate.pass_through(going))
    assert capsys.readouterr().err.count("rate limited") == 1


def test_an_hour_is_not_waited_for_and_what_came_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Request) -> Reply | str:
        return Reply(status=429, headers={"retry-after": "3600"}) if len(server.asked) > 3 else echo(request)

    with scripted(answer) as server:
        with pytest.raises(RunError, match=r"wait 3600 s.*judge\.patience=300.* 3 of 9 answers have come and are kept"):
            judge(server.url, monkeypatch, concurrency=1).ask(questions(9))
        asked = len(server.asked)
        server.asked.clear()
        judge(server.url, monkeypatch, concurrency=1).ask(questions(3))
        assert asked == 4 and not server.asked


def test_a_server_that_stumbles_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Request) -> Reply | str:
        return Reply(status=(503, 500, 408)[len(server.asked) - 1]) if len(server.asked) <= 3 else echo(request)

    with scripted(answer) as server:
        assert texts(judge(server.url, monkeypatch, concurrency=1).ask(questions(1))) == ["to question 0"]
        assert len(server.asked) == 4
    with (
        scripted(lambda request: Reply(status=500)) as server,
        pytest.raises(RunError, match=r"answers 500 .* after 3 retries"),
    ):
        judge(server.url, monkeypatch, concurrency=1).ask(questions(1))


@pytest.mark.parametrize(
    ("status", "sentence"), [(401, "does not take the key"), (403, "does not take the key"), (404, "no such model")]
)
def test_what_no_other_question_would_change_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, status: int, sentence: str
) -> None:
    with scripted(lambda request: Reply(status=status)) as server:
        with pytest.raises(UserError, match=sentence):
            judge(server.url, monkeypatch, concurrency=1).ask(questions(4))
        assert len(server.asked) == 1


def test_a_quota_that_is_used_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"error": {"message": "you exceeded it", "code": "insufficient_quota"}})
    with scripted(lambda request: Reply(status=429, body=body)) as server:
        with pytest.raises(RunError, match="no quota left: you exceeded it"):
            judge(server.url, monkeypatch, concurrency=1).ask(questions(2))
        assert len(server.asked) == 1


def test_a_refused_question_has_no_text_and_is_asked_again_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: Request) -> Reply | str:
        long = request["messages"][0]["content"] == "question 1"
        return Reply(status=400, body='{"error": {"message": "too long"}}') if long else echo(request)

    with scripted(answer) as server:
        found = judge(server.url, monkeypatch).ask(questions(3))
        assert texts(found) == ["to question 0", None, "to question 2"]
        assert found[1].finish == "400: too long" and found[1].whole is None
        judge(server.url, monkeypatch).ask(questions(3))
        assert len(server.asked) == 4


@pytest.mark.parametrize(
    "body", ["<html>welcome</html>", "{}", '{"choices": []}', '{"choices": null}', "[]", '{"error": "x"}', ""]
)
def test_an_endpoint_that_answers_something_else_is_given_up(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    with scripted(lambda request: Reply(body=body)) as server:
        with pytest.raises(UserError, match="refuses everything: the answer has no choices"):
            judge(server.url, monkeypatch, concurrency=1).ask(questions(50))
        assert len(server.asked) == judges.HOPELESS


def test_an_answer_without_content_or_cut_at_the_limit_is_no_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"model": "m", "choices": [{"message": {"content": None}, "finish_reason": "length"}]})
    with scripted(lambda request: Reply(body=body)) as server:
        [found] = judge(server.url, monkeypatch).ask(questions(1))
    assert (found.text, found.whole) == ("", None)


def test_an_unreachable_judge_is_one_sentence_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(echo) as server:
        pass
    with pytest.raises(RunError, match=r"cannot be reached \(.*refused.*\); ALIGN_JUDGE_URL names the address\.$"):
        judge(server.url, monkeypatch).ask(questions(3))


def test_a_key_or_an_address_that_is_missing_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="ALIGN_JUDGE_URL and ALIGN_JUDGE_KEY, or OPENAI_API_KEY alone"):
        judges.endpoint()
    monkeypatch.setenv("ALIGN_JUDGE_URL", "127.0.0.1:8000")
    with pytest.raises(UserError, match="an address such as http"):
        judges.endpoint()
    with pytest.raises(UserError, match=r"judge\.model=NAME or ALIGN_JUDGE_MODEL=NAME"):
        judge("http://127.0.0.1:1/v1", monkeypatch, model=None)
    monkeypatch.setenv("ALIGN_JUDGE_KEY", "sëcret")
    with pytest.raises(UserError, match="plain ASCII") as told:
        judges.endpoint()
    assert "sëcret" not in str(told.value)


def test_openais_key_goes_to_no_address_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "openais")
    assert judges.endpoint() == judges.Endpoint(judges.OPENAI, "openais")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://me:pass@example.org/v1/")
    found = judges.endpoint()
    assert found.key == "openais" and found.host == "example.org" and found.where == "example.org/v1"
    monkeypatch.setenv("ALIGN_JUDGE_URL", "http://127.0.0.1:1/v1")
    assert judges.endpoint().key is None
    monkeypatch.setenv("ALIGN_JUDGE_KEY", "own")
    assert judges.endpoint().key == "own"
    assert "own" not in repr(judges.endpoint())


def test_a_key_in_the_clear_is_warned_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ALIGN_JUDGE_KEY", "own")
    monkeypatch.setenv("ALIGN_JUDGE_URL", "http://judge.example.org/v1")
    judges.endpoint()
    assert "unencrypted" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["key", "api_key", "url", "base_url"])
def test_a_key_in_the_configuration_is_refused(key: str) -> None:
    node = yaml.safe_load((paths.conf() / "judge" / "openai.yaml").read_text())
    assert [p for p in config.check(Judge, {**node, key: "x"}, "judge") if f"judge.{key}: no such key" in p]


def test_the_cost_is_told_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 x (10 bytes / 4 + 8 tokens) = 22 tokens in, 2 x 100 out; at $1e4 and $1e6 a million."""
    with scripted(echo) as server:
        priced = {"price_in": 1e4, "price_out": 1e6, "max_tokens": 100}
        one = judge(server.url, monkeypatch, **priced)
        assert "2 requests; about 22 tokens in (4 bytes each), at most 200 out: between $0.22 and $200.22" in (
            one.estimate(questions(2), kept=0)
        )
        judge(server.url, monkeypatch).ask(questions(2))
    assert "its prices are not known (judge.price_in, judge.price_out)" in capsys.readouterr().err


def test_no_more_than_max_cost_is_spent_and_what_came_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request may cost $1 for its 100 tokens and costs $0.25 for the 25 that it has: 17 end at $4.25."""
    priced = {"price_in": 0.0, "price_out": 1e4, "max_tokens": 100, "max_cost": 5.0}
    with scripted(lambda request: Reply("yes", usage=(10, 25))) as server:
        with pytest.raises(UserError, match=r"judge\.max_cost=5 .* 17 of 40 answers have come and are kept"):
            judge(server.url, monkeypatch, concurrency=1, **priced).ask(questions(40))
        assert len(server.asked) == 17
        judge(server.url, monkeypatch, concurrency=3, **priced).ask(questions(24))
        assert len(server.asked) == 24, "what is known costs nothing, and 4 that came and 3 under way at most $4"
    with scripted(lambda request: Reply("yes", usage=(10, 100))) as server:
        with pytest.raises(UserError, match="max_cost"):
            judge(server.url, monkeypatch, concurrency=8, **priced).ask(questions(40))
        assert len(server.asked) <= 5


def test_a_limit_of_unknown_prices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"judge\.max_cost=1 needs prices"):
        judge("http://127.0.0.1:1/v1", monkeypatch, max_cost=1.0)


def test_a_killed_evaluation_resumes_with_what_was_answered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hanging: list[int] = []

    def answer(request: Request) -> str:
        if request["messages"][0]["content"] == "question 6" and not hanging:
            hanging.append(1)
            time.sleep(1.0)
        return echo(request)

    program = (
        "import test_judges as t, pytest\n"
        "with pytest.MonkeyPatch.context() as patch:\n"
        "    t.judge(t.os.environ['AT'], patch, concurrency=1).ask(t.questions(9))\n"
    )
    with scripted(answer) as server:
        own = {**os.environ, "AT": server.url, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"}
        process = subprocess.Popen([sys.executable, "-c", program], env=own, stderr=subprocess.DEVNULL)
        while not hanging:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.asked.clear()
        found = judge(server.url, monkeypatch).ask(questions(9))
    assert texts(found) == [f"to question {number}" for number in range(9)]
    again = sorted(request["messages"][0]["content"] for request in server.asked)
    assert again == [f"question {number}" for number in (6, 7, 8)]


@pytest.mark.parametrize(
    ("told", "seconds"), [("7", 7), ("0.5", 0.5), ("-3", 0), ("soon", None), ("inf", None), (None, None)]
)
def test_retry_after_is_a_number_of_seconds(told: str | None, seconds: float | None) -> None:
    assert judges.retry_after({} if told is None else {"retry-after": told}) == seconds


def test_retry_after_may_be_a_date() -> None:
    assert judges.retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert (judges.retry_after({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}) or 0) > 1e8


def test_the_identity_names_who_answered_and_when(monkeypatch: pytest.MonkeyPatch) -> None:
    one = judge("http://127.0.0.1:9/v1", monkeypatch)
    answers = [Answer("a", "stop", "m-2", "2026-01-03"), Answer("b", "stop", "m-1", "2026-01-02")]
    told = judges.identity(one, [*answers, Answer(None, "400", "", "")], "abc")
    assert told["judge"] == "m-1+m-2@127.0.0.1:9"
    assert told["judge_date"] == "2026-01-02 to 2026-01-03" and told["judge_template"] == "abc"
