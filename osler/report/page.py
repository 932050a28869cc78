"""The report: one self-contained HTML page about a run, written into its folder as `report.html`.

Nothing on the page comes from elsewhere: style, script and charts are inline, fonts are the reader's own, and a content
policy forbids the browser to fetch anything. All of it can be read without the script, which adds read-outs on the
curves and the switch between light and dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path

from osler.errors import UserError
from osler.report import sections
from osler.report.read import Run, read_run
from osler.report.samples import samples
from osler.runtime.files import RunFolder, write_atomic

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header class="top">
<p class="brand"><b>Osler</b> <span>{name}</span></p>
<nav aria-label="Sections">{links}</nav>
<button type="button" id="theme" hidden>Dark</button>
</header>
<main id="main">
{body}
</main>
<footer><p>{footer}</p></footer>
<div id="readout" role="status" hidden></div>
<script>
{script}</script>
</body>
</html>
"""

LINKS = (
    ("exams", "Exams"),
    ("grpo", "Before/after"),
    ("samples", "Samples"),
    ("time", "Time"),
    ("happened", "What happened"),
    ("curves", "Curves"),
    ("watch", "To watch"),
    ("next", "Next"),
    ("record", "Record"),
)


def build_report(run_folder: str | Path | Run, out: str | Path | None = None) -> Path:
    """Write the page, into the run folder unless `out` names a file, and return its path.

    Raises UserError when it is not a run folder, or when the file cannot be written.
    """
    run = read_run(run_folder)
    return write_page(RunFolder(run.path).report if out is None else Path(out), render(run))


def write_page(path: Path, text: str) -> Path:
    """Write a page and return its path; raises UserError when its place takes no file."""
    try:
        write_atomic(path, text)
    except OSError as error:
        elsewhere = "`osler report RUN --out FILE`, or `osler compare` with --out FILE, writes it elsewhere."
        raise UserError(f"The page cannot be written to {path}: {error.strerror}. {elsewhere}") from error
    return path


def render(run: Run) -> str:
    """The whole page as text."""
    lead, body = samples(run)
    parts = [
        sections.hero(run),
        sections.strip(run),
        sections.exams(run),
        sections.comparison(run),
        sections.section("samples", "Samples", lead, body),
        sections.cost(run),
        sections.happened(run),
        sections.curves(run),
        sections.watch(run),
        sections.what_next(run),
        sections.record(run),
    ]
    return assemble(run.path.resolve().name, "Osler run report", "the files of this run", parts, LINKS)


def assemble(name: str, what: str, made_of: str, parts: Sequence[str], links: Sequence[tuple[str, str]]) -> str:
    """A page of sections, with links to those that are there."""
    content = "\n".join(part for part in parts if part)
    shown = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title in links if f'<section id="{anchor}"' in content)
    name = html.escape(name)
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return PAGE.format(
        policy=POLICY, title=f"{name}: {what}", name=name, links=shown, body=content,
        style=_asset("style.css"), script=_asset("script.js"),
        footer=f"Made by Osler from {made_of}, {made}. The page fetches nothing; it can be moved or sent.",
    )  # fmt: skip


def _asset(name: str) -> str:
    return resources.files("osler.report").joinpath(name).read_text(encoding="utf-8")
