"""Opens a page in a headless Chromium and tells what it did."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@dataclass(frozen=True)
class Visit:
    """What a page made of itself, and what it said and asked for.

    Attributes:
        dom: after its scripts have run.
        said: lines of its console, errors and warnings among them.
        asked: addresses that it asked for; what the browser asks for on its own account does not count.
    """

    dom: str
    said: list[str]
    asked: list[str]


def visit(page: Path, folder: Path) -> Visit:
    """Open a page; no name is resolved, so that nothing leaves the machine."""
    assert CHROMIUM is not None
    log = folder / "net.json"
    ended = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-extensions",
            "--disable-background-networking",
            "--disable-component-update",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={log}",
            "--enable-logging=stderr",
            "--virtual-time-budget=1000",
            "--dump-dom",
            page.absolute().as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    told = json.loads(log.read_text(encoding="utf-8"))
    start = told["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    begun = [event["params"] for event in told["events"] if event["type"] == start and "url" in event.get("params", {})]
    asked = [job["url"] for job in begun if job.get("initiator") != "not an origin"]
    return Visit(ended.stdout, [line for line in ended.stderr.splitlines() if "CONSOLE" in line], asked)
