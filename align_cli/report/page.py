"""One HTML page that needs nothing beside itself: sections in, a file out.

Whatever a section says is text and is escaped; only a `Figure` brings markup of its own, which `figures` has made. The
page's policy forbids every request and every script but its own, so that text that slips through can do nothing.
"""

import base64
import hashlib
import html
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align_cli import rundir
from align_cli.errors import UserError
from align_cli.report.figures import numbers
from align_cli.statistics import Interval

GENERATOR = '<meta name="generator" content="align">'

Cell = str | int | float | Interval | None
Tone = Literal["plain", "good", "bad", "warning"]
SIGNS: dict[Tone, str] = {"plain": "", "good": "✓ ", "bad": "✗ ", "warning": "! "}


@dataclass(frozen=True)
class Heading:
    """The title of what follows, also in the list at the top of the page."""

    text: str


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by empty lines."""

    text: str


@dataclass(frozen=True)
class Verdict:
    """A sentence or two that a reader should see first; the tone has a sign and a colour."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Bullets:
    """Sentences that stand for themselves."""

    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Names and values, as of a configuration."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows under headings; a click on a heading sorts by it where the table is sortable.

    Numbers are aligned, texts that are numbers as they are, and have the decimals of their column, or, `by_row`, of
    their row, where a row is one figure.
    An `Interval` is an estimate with its bounds.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    sortable: bool = False
    caption: str = ""
    by_row: bool = False


@dataclass(frozen=True)
class Figure:
    """A picture of `figures`, with what is to be known of it. Neighbours stand side by side where there is room."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Samples:
    """Responses to prompts before and after training: (prompt, before, after); None where one was not recorded."""

    items: Sequence[tuple[str, str | None, str | None]]


@dataclass(frozen=True)
class Commands:
    """Command lines, each to be copied whole."""

    items: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """What few readers want to see, behind its title."""

    title: str
    sections: Sequence["Section"]


Section = Heading | Text | Verdict | Bullets | Facts | Table | Figure | Samples | Commands | Folded


def write(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: the file cannot be written there.
    """
    try:
        rundir.write_atomic(path, render(title, sections))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; use another file.") from error


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as text."""
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    headings = [section.text for section in sections if isinstance(section, Heading)]
    entries = "".join(f'<li><a href="#part-{n}">{_text(text)}</a></li>' for n, text in enumerate(headings, start=1))
    contents = f'<nav aria-label="Contents"><ul>{entries}</ul></nav>' if len(headings) > 2 else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n{GENERATOR}\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n{contents}\n{_body(sections)}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _body(sections: Sequence[Section]) -> str:
    parts: list[str] = []
    number, figures = 0, list[str]()
    for section in (*sections, None):
        if isinstance(section, Figure):
            figures.append(_figure(section))
            continue
        if figures:
            parts.append(f'<div class="figures">{"".join(figures)}</div>')
            figures = []
        if isinstance(section, Heading):
            number += 1
            parts.append(f'<h2 id="part-{number}">{_text(section.text)}</h2>')
        elif section is not None:
            parts.append(_part(section))
    return "\n".join(parts)


def _part(section: Text | Verdict | Bullets | Facts | Table | Samples | Commands | Folded) -> str:
    match section:
        case Text(text):
            return "".join(f"<p>{_text(part)}</p>" for part in re.split(r"\n\s*\n", text.strip()) if part)
        case Verdict(text, tone):
            return f'<p class="verdict {tone}"><span aria-hidden="true">{SIGNS[tone]}</span>{_text(text)}</p>'
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"
        case Facts(items):
            told = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in items)
            return f"<dl>{told}</dl>"
        case Table():
            return _table(section)
        case Samples(items):
            return f'<div class="samples">{"".join(_sample(*item) for item in items)}</div>'
        case Folded(title, inside):
            return f"<details><summary>{_text(title)}</summary>{_body(inside)}</details>"
        case Commands(items):
            return "".join(f"<pre><code>{_text(item)}</code></pre>" for item in items)


def _figure(figure: Figure) -> str:
    caption = f"<figcaption>{_text(figure.caption)}</figcaption>" if figure.caption else ""
    return f"<figure>{figure.svg}{caption}</figure>"


def _sample(prompt: str, before: str | None, after: str | None) -> str:
    def side(name: str, text: str | None) -> str:
        shown = '<span class="soft">not recorded</span>' if text is None else _text(text)
        return f'<div><span class="soft">{name}</span><pre>{shown}</pre></div>'

    return f'<article><div><span class="soft">prompt</span><pre>{_text(prompt)}</pre></div>' + (
        f"{side('before', before)}{side('after', after)}</article>"
    )


def _table(table: Table) -> str:
    columns = [[row[place] for row in table.rows] for place in range(len(table.header))]
    if table.by_row:
        lines = [_written(row) for row in table.rows]
        written = [[line[place] for line in lines] for place in range(len(table.header))]
    else:
        written = [_written(column) for column in columns]
    numeric = [any(_value(cell) is not None for cell in column) and all(map(_aligns, column)) for column in columns]
    head: list[str] = []
    for name, right in zip(table.header, numeric, strict=True):
        told = f'<button type="button">{_text(name)}</button>' if table.sortable else _text(name)
        head.append(f'<th scope="col"{" class=number" if right else ""}>{told}</th>')
    rows: list[str] = []
    for place, row in enumerate(table.rows):
        cells: list[str] = []
        for column, cell in enumerate(row):
            key = f' data-key="{_key(cell)}"' if table.sortable and numeric[column] else ""
            right = " class=number" if numeric[column] else ""
            cells.append(f"<td{right}{key}>{_text(written[column][place])}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    kind = ' class="sortable"' if table.sortable else ""
    return (
        f'<div class="scroll"><table{kind}>{caption}<thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _value(cell: Cell) -> float | None:
    """The finite number that a cell is."""
    try:
        value = float(cell.estimate if isinstance(cell, Interval) else cell or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _aligns(cell: Cell) -> bool:
    """Whether a column of numbers may hold a cell: a number or nothing."""
    return not isinstance(cell, str) or cell in ("", "null") or _value(cell) is not None


def _key(cell: Cell) -> str:
    """What a cell is sorted by; nothing for what is not a finite number, which comes last."""
    value = _value(cell)
    return "" if value is None else repr(value)


def _written(cells: Sequence[Cell]) -> list[str]:
    """The cells as text, with equally many decimals where that tells them apart."""
    values: list[float] = []
    for cell in cells:
        values += cell if isinstance(cell, Interval) else [cell] if isinstance(cell, float) else []
    written = iter(numbers(values))

    def text(cell: Cell) -> str:
        match cell:
            case None:
                return ""
            case str():
                return cell
            case Interval():
                return "{} [{}, {}]".format(*itertools.islice(written, 3))
            case int():
                return f"{cell:,}".replace("-", "−")
            case _:
                return next(written)

    return [text(cell) for cell in cells]


def _text(text: str) -> str:
    """Escaped, without what HTML cannot hold: control characters, and halves of surrogate pairs."""
    plain = "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)
    return html.escape(plain.encode("utf-8", "replace").decode("utf-8"))


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #5c6670; --grid: #e3e7eb; --raised: #f5f7f9; --link: #005a9c;
  --on-middle: var(--ink);
  --good: #00664a; --bad: #a33c00; --warning: #7a5200;
  --series-1: #0072b2; --series-2: #d55e00; --series-3: #009e73; --series-4: #cc79a7;
  --series-5: #e69f00; --series-6: #56b4e9; --series-7: #5c6670; --series-8: #000000;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #e8ebee; --soft: #a0aab4; --grid: #2c333b; --raised: #1d232a; --link: #7cc0f5;
    --on-middle: var(--paper);
    --good: #4fd0a6; --bad: #ff9a66; --warning: #f0c04a;
    --series-1: #56b4e9; --series-2: #e69f00; --series-3: #00b585; --series-4: #cc79a7;
    --series-5: #e06a10; --series-6: #3a8fd0; --series-7: #a0aab4; --series-8: #f0e442;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1120px; padding: 28px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 10px; }
h2 { font-size: 18px; margin: 36px 0 10px; padding-top: 12px; border-top: 1px solid var(--grid); }
p, ul { max-width: 82ch; margin: 8px 0; }
a { color: var(--link); }
nav ul {
  list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; margin: 0 0 14px;
  max-width: none;
}
.soft { color: var(--soft); }
.verdict {
  max-width: none; margin: 10px 0; padding: 10px 14px; background: var(--raised); border-left: 4px solid var(--soft);
}
.verdict span { font-weight: 700; }
.verdict.good { border-color: var(--good); } .verdict.good span { color: var(--good); }
.verdict.bad { border-color: var(--bad); } .verdict.bad span { color: var(--bad); }
.verdict.warning { border-color: var(--warning); } .verdict.warning span { color: var(--warning); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 18px; margin: 10px 0; }
dt { color: var(--soft); } dd { margin: 0; }
pre {
  margin: 6px 0; padding: 8px 10px; background: var(--raised); white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
.figures { display: flex; flex-wrap: wrap; gap: 18px 32px; margin: 14px 0; align-items: flex-start; }
figure { margin: 0; max-width: 100%; overflow-x: auto; }
figure svg { display: block; max-width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { color: var(--soft); font-size: 13px; line-height: 1.45; max-width: 500px; margin-top: 4px; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--link); }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 13px; padding-bottom: 6px; }
th, td { padding: 5px 18px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; vertical-align: bottom; border-bottom-color: var(--soft); }
.number { text-align: right; white-space: nowrap; }
th button {
  font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit;
}
th button:hover { text-decoration: underline; }
th[aria-sort] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
.samples article {
  display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 0 16px; padding: 8px 0; border-bottom: 1px solid var(--grid);
}
.samples article > div { min-width: 0; }
.samples .soft { font-size: 13px; }
@media (max-width: 720px) {
  body { padding: 18px 14px 48px; }
  .samples article { grid-template-columns: 1fr; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; }
}
"""

# A click sorts ascending, a second one descending; what has no number comes last either way.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1, body = table.tBodies[0];
    const compare = (one, other) => {
      const a = one.cells[place], b = other.cells[place];
      if (a.dataset.key === undefined) return sign * a.textContent.localeCompare(b.textContent, "en", {numeric: true});
      if (a.dataset.key === "" || b.dataset.key === "") return (a.dataset.key === "") - (b.dataset.key === "");
      return sign * (Number(a.dataset.key) - Number(b.dataset.key));
    };
    body.append(...[...body.rows].sort(compare));
  }));
}
"""
