"""The data card: what is in a folder of shards, where it comes from, what was left out and how to make it again, in Markdown.

It states what was counted or configured and nothing else (after Gebru et al. 2021, Datasheets for Datasets). The text of exam
questions is not shown, so that the card does not spread it. Paths of local files are not shown either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from osler.config.recipe import dump_yaml
from osler.data.clean import EXAM, LANGUAGE_CHARACTERS, LANGUAGE_WORDS
from osler.data.contamination import COVERAGE, LEAST_WORDS, OPTIONS_WITHIN, SEQUENCE_WORDS
from osler.data.holdout import HELD_OUT
from osler.data.shards import VALIDATION_PREFIX
from osler.data.tokenise import EXAMPLES
from osler.data.writing import Journal, read_journal

CARD = "DATA_CARD.md"
ITEMS_SHOWN = 10  # how many of the exam items that were found


def data_card(manifest: Mapping[str, Any], folder: Path) -> str:
    """Return the data card of a finished folder; ``manifest`` is that of the folder."""
    sources: dict[str, dict[str, Any]] = manifest["sources"]
    journals = {name: read_journal(folder / name) for name in sources}
    parts = [
        "# Data card",
        f"Content fingerprint `{manifest['content_fingerprint']}`. `manifest.json` names every file that was read.",
        "## Sources",
        *_sources(sources, manifest["validation"]),
        "## Tokenizer",
        f"`tokenizer.json` beside this card: {manifest['vocab_size']:,} tokens, fingerprint "
        f"`{manifest['tokenizer_fingerprint']}`. Every document ends with its end-of-text token.",
        "## What was left out",
        *_left_out(sources, journals),
        "## Exams",
        *_exams(sources, journals),
        "## What is not known",
        "Nothing looked for personal data, errors or offensive content, and nobody has read all documents. Copies were looked "
        "for at most within each source. Copies of held-out documents were dropped from other sources too, near copies were not.",
        "## How to make it again",
        *_recipe(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; numbers have thousands separators."""
    written = [[f"{cell:,}" if isinstance(cell, int) else _plain(str(cell)) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([*titles], ["---"] * len(titles), *written))


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is, in a cell of a table too."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in " ".join(text.split()))


def _sources(sources: Mapping[str, Mapping[str, Any]], sets: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    total = sum(source["weight"] for source in sources.values())
    facts, counts = [], []
    for name, source in sources.items():
        about, content = source["about"], source["content"]
        is_made, home = about.get("config", {}).get("type") == "clinic", about.get("home", "")
        home = Path(home).name if Path(home).is_absolute() else home or ("made by Osler" if is_made else "files")
        licence = about.get("licence") or ("that of Osler" if is_made else "not stated")
        share = f"{content['holdout_fraction']:.2%} of the documents, by hash" if content["holdout_fraction"] else "nothing"
        held = share if content["validation"] is None else "documents of its own"
        facts.append([name, f"{source['weight'] / total:.1%}", licence, home, about.get("revision", "–"), held])
    for name, entry in [*sources.items(), *((f"{VALIDATION_PREFIX}{name}", entry) for name, entry in sets.items())]:
        for split, found in entry["splits"].items():
            rate = f"{found['bytes'] / max(1, found['tokens']):.2f}"
            counts.append([name, split, found["documents"], found["tokens"], found["bytes"], rate])
    yield _table(["source", "weight in a run", "licence", "from", "revision", "held out"], facts)
    yield _table(["source", "split", "documents", "tokens", "bytes of text", "bytes per token"], counts)
    if sets:
        yield "What is in a validation set is in the training data of no source, nor are copies of it."
        return
    yield (
        "The hash is of the text without case and spacing, or of the page that a document was made from where one is named. So "
        "a document is held out together with its copies. What one source holds out is in the training data of none."
    )
    if len({source["content"]["holdout_fraction"] for source in sources.values()}) > 1:
        yield (
            "Sources hold out different shares. Where one that holds out more is too large to list what it holds out, the others "
            "also lose the documents that it would hold out if it had them."
        )


def _left_out(sources: Mapping[str, Mapping[str, Any]], journals: Mapping[str, Journal]) -> Iterator[str]:
    rows, examples = [], []
    for name, source in sources.items():
        reasons = {"empty": source["empty_documents"], HELD_OUT: source["dropped_copies"], **source["dropped"]}
        read = max(1, journals[name].counts["documents"])
        rows += [[name, reason, count, f"{count / read:.3%}"] for reason, count in reasons.items() if count]
        for reason, texts in journals[name].examples.items():
            if reason != EXAM:
                examples += [f"- {_plain(name)}, {reason}: {_plain(text)} …" for text in texts[:EXAMPLES]]
    yield (
        "The sections `clean` of the recipe below say what was looked for. The language of a document is told from its first "
        f"{LANGUAGE_CHARACTERS:,} characters; where it has fewer than {LANGUAGE_WORDS} words, it is kept."
    )
    yield _table(["source", "reason", "documents", "of those read"], rows) if rows else "Nothing was left out."
    if examples:
        yield "How some of them begin (those with exam questions are not shown, so that this card does not spread them):"
        yield "\n".join(sorted(examples))


def _exams(sources: Mapping[str, Mapping[str, Any]], journals: Mapping[str, Journal]) -> Iterator[str]:
    rows = []
    for name, source in sources.items():
        clean = source["content"]["options"].get("clean") or {}
        exams = [f"{exam['type']} {exam['split']}".strip() for exam in clean.get("exams", [])]
        dropped = "dropped" if clean.get("exam_questions") == "drop" else "kept"
        found = [len(journals[name].exam_items), dropped] if exams else ["–", "–"]
        rows.append([name, ", ".join(exams) or "not checked", *found])
    yield _table(["source", "checked for", "items found", "documents with them were"], rows)
    yield (
        f"An item counts as found where a document has at least {COVERAGE:.0%} of the sequences of {SEQUENCE_WORDS} words of its "
        "question or passage; case, punctuation and the exam's own phrases do not count. A question of fewer words must stand "
        f"there whole, with half of its options (or its answer) within {OPTIONS_WITHIN} words; one of fewer than {LEAST_WORDS} "
        "words is not looked for. Rewordings and translations are not found."
    )
    if found := sorted(set().union(*(journal.exam_items for journal in journals.values()))):
        some = ", ".join(f"`{item}`" for item in found[:ITEMS_SHOWN])
        yield f"Found: {some}; `exams.json` has all that were found, and all that were looked for."


def _recipe(manifest: Mapping[str, Any]) -> Iterator[str]:
    configs, sets = ([_config(entry) for entry in manifest[kind].values()] for kind in ("sources", "validation"))
    if not all([*configs, *sets]):  # corpora that no config describes
        return
    data = {"type": "mixture", "sources": configs} if len(configs) > 1 else configs[0]
    recipe = {"data": data, **({"validation": sets} if sets else {}), "tokenizer": {"path": "tokenizer.json"}}
    yield (
        "Write these lines into `RECIPE.yaml`. Put beside it the tokenizer that is beside this card and, under the names in the "
        "recipe, the files or folders of files that were read:"
    )
    yield f"```yaml\n{dump_yaml(recipe).rstrip()}\n```"
    yield "```sh\nosler data prepare RECIPE.yaml --out FOLDER\n```"


def _config(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a source that gives the same documents again."""
    given = entry["about"].get("config", {})
    config = {key: value for key, value in given.items() if key not in ("streaming", "disk_budget_gb")}
    commit = entry["content"]["options"].get("commit")
    return {**_without_places(config), **({"revision": commit} if commit else {})}


def _without_places(value: Any) -> Any:
    """Return a config with names of files and folders in place of their paths."""
    if isinstance(value, Mapping):
        is_place = {key: key in ("path", "root") and isinstance(item, str) for key, item in value.items()}
        return {key: Path(item).name if is_place[key] else _without_places(item) for key, item in value.items()}
    return [_without_places(item) for item in value] if isinstance(value, list) else value
