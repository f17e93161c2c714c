"""An OpenAI-compatible server on loopback whose answers a test writes down beforehand."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

from align_cli import config, judges, paths
from align_cli.judges import Judge

Request = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What the server sends; a text becomes an ordinary completion."""

    text: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None
    finish: str = "stop"
    usage: tuple[int, int] = (10, 5)


Script = Callable[[Request], Reply | str]


@dataclass
class Scripted:
    """A server, and what it was asked."""

    url: str
    asked: list[Request]
    keys: list[str | None]


@contextmanager
def scripted(answer: Script) -> Iterator[Scripted]:
    """Within the block a server answers each request as `answer` says."""
    lock = threading.Lock()
    asked: list[Request] = []
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                asked.append(request)
                keys.append(self.headers["authorization"])
            told = answer(request)
            reply = Reply(told) if isinstance(told, str) else told
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text},
                "finish_reason": reply.finish,
            }
            usage = {"prompt_tokens": reply.usage[0], "completion_tokens": reply.usage[1]}
            whole = {"object": "chat.completion", "model": "served-name", "choices": [choice], "usage": usage}
            body = (json.dumps(whole) if reply.body is None else reply.body).encode()
            self.send_response(reply.status)
            for name, value in {"content-type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError):  # whoever asked was killed
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """The tests' output is not the place for it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Scripted(f"http://127.0.0.1:{server.server_port}/v1", asked, keys)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def judge(url: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Judge:
    """A judge at an address, with short waits."""
    monkeypatch.setenv(judges.URLS[0], url)
    node = yaml.safe_load((paths.conf() / "judge" / "local.yaml").read_text())
    quick = {"model": "judge-1", "backoff": 0.01, "retries": 3, "concurrency": 2, "timeout": 20.0}
    return config.build(Judge, {**node, **quick, **changes})
