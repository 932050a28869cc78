"""The pages as HTML: the door to Jinja2. Whatever a run wrote is escaped; the drawings of ``svg.py`` escape their own text.

A page fetches nothing: style, script and charts are in it, the fonts are the reader's, and a content policy forbids the browser
to load anything. All of it can be read without the script, which adds read-outs on the curves and the switch between light and
dark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from osler.config.recipe import dump_yaml
from osler.report import charts, svg, words
from osler.report import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import write_atomic

PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("osler.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
DRAWINGS: tuple[Callable[..., str], ...] = (svg.interval_bar, svg.ladder, svg.histogram)
TEXTS: tuple[Callable[..., Any], ...] = (
    *(fmt.percent, fmt.points, fmt.count, fmt.plural, fmt.duration, charts.legend_value, dump_yaml),
    *(words.stage_title, words.stage_colour, words.in_sentence, words.interval, words.difference_in_words),
)
PAGES.globals |= {function.__name__: lambda *args, draw=function, **kw: Markup(draw(*args, **kw)) for function in DRAWINGS}
PAGES.globals |= {function.__name__: function for function in TEXTS}


def render(template: str, **values: Any) -> Markup:
    """Return a template of ``templates/`` filled with values."""
    return Markup(PAGES.get_template(template).render(values))


def page(name: str, what: str, made_of: str, body: Markup, links: Mapping[str, str]) -> str:
    """Return a page around its sections, with a link to each that is there; ``links`` are titles by section."""
    there = re.findall('<section id="([^"]+)"', body)
    style, script = (
        Markup(resources.files("osler.report").joinpath(file).read_text(encoding="utf-8")) for file in ("style.css", "script.js")
    )
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    links = {anchor: title for anchor, title in links.items() if anchor in there}
    about = {"name": name, "what": what, "made_of": made_of, "made": made, "links": links}
    return render("page.html", **about, body=body, style=style, script=script)


def write_page(path: Path, text: str) -> Path:
    """Write a page and return its path; raises UserError when its place takes no file."""
    try:
        write_atomic(path, text)
    except OSError as error:
        elsewhere = "`osler report RUN --out FILE`, or `osler compare` with --out FILE, writes it elsewhere."
        raise UserError(f"The page cannot be written to {path}: {error.strerror}. {elsewhere}") from error
    return path
