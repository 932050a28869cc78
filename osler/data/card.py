"""The data card: what is in a folder of shards, where it comes from, what was left out and how to make it again, in Markdown.

It states what was counted or configured and nothing else (after Gebru et al. 2021, Datasheets for Datasets). The text of exam
questions is not shown, so that the card does not spread it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from osler.config.recipe import dump_yaml
from osler.data.clean import EXAM, LANGUAGE_CHARACTERS, LANGUAGE_WORDS
from osler.data.contamination import COVERAGE, LEAST_WORDS, OPTIONS_WITHIN, SEQUENCE_WORDS
from osler.data.holdout import HELD_OUT
from osler.data.writing import journal_lines

CARD = "DATA_CARD.md"
FILES_SHOWN = 20  # of a source
ITEMS_SHOWN = 10  # of the exam items that were found


def data_card(manifest: Mapping[str, Any], journals: Sequence[Path]) -> str:
    """Return the card of a finished folder; `journals` belong to its sources, in the same order."""
    sources: dict[str, dict[str, Any]] = manifest["sources"]
    found = {name: _read(journal) for name, journal in zip(sources, journals, strict=True)}
    splits = [split for source in sources.values() for split in source["splits"].values()]
    totals = [f"{sum(split[what] for split in splits):,} {what}" for what in ("documents", "tokens", "bytes")]
    parts = [
        "# Data card",
        f"{', '.join(totals[:2])} and {totals[2]} of text, from {len(sources)} source{'s' * (len(sources) > 1)}. Content "
        f"fingerprint `{manifest['content_fingerprint']}`.",
        "## Sources",
        *_sources(sources),
        "## Counts",
        _counts(sources),
        *_held_out(sources, manifest["validation"]),
        "## Tokenizer",
        f"`tokenizer.json` beside this card: {manifest['vocab_size']:,} tokens, fingerprint "
        f"`{manifest['tokenizer_fingerprint']}`. Every document ends with its end-of-text token.",
        "## What was left out",
        *_left_out(sources, found),
        "## Exams",
        *_exams(sources, found),
        "## What is not known",
        "Nothing looked for personal data, errors or offensive content, and nobody has read all documents. Copies were looked "
        "for at most within each source. Of held-out documents copies in other sources were dropped too, near copies were not.",
        "## How to make it again",
        *_recipe(manifest),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


class _Found(NamedTuple):
    """What the journal of a source says: the documents read, examples of dropped ones by reason, exam items."""

    documents: int
    examples: Mapping[str, list[str]]
    items: set[str]


def _read(journal: Path) -> _Found:
    documents, examples, items = 0, dict[str, list[str]](), set[str]()
    for line, _ in journal_lines(journal):
        documents = line["counts"].get("documents", 0)
        for reason, texts in line.get("examples", {}).items():
            examples.setdefault(reason, []).extend(texts)
        items.update(line.get("exam_items", ()))
    return _Found(documents, examples, items)


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; numbers have thousands separators and stand at the right."""
    written = [[f"{cell:,}" if isinstance(cell, int) else _plain(str(cell)) for cell in row] for row in rows]
    cells = list(zip(*written, strict=True)) or [()] * len(titles)
    is_number = [
        bool(column) and all(cell.strip("%").replace(",", "").replace(".", "").isdigit() for cell in column) for column in cells
    ]
    rule = ["---:" if right else "---" for right in is_number]
    return "\n".join(f"| {' | '.join(row)} |" for row in ([*titles], rule, *written))


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is, in a cell of a table too."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in " ".join(text.split()))


def _sources(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows, files = [], []
    total = sum(source["weight"] for source in sources.values())
    for name, source in sources.items():
        about, own = source["about"], source["content"]["files"]
        is_made = about.get("config", {}).get("type") == "clinic"
        home = Path(about["home"]).name if _is_on_disk(about.get("home", "")) else about.get("home", "")
        home = home or ("made by Osler" if is_made else "files, listed below")
        licence = about.get("licence") or ("that of Osler" if is_made else "not stated")
        size = 0 if is_made else sum(size for _, size, _ in own)
        share = f"{source['weight'] / total:.1%}"
        rows.append([name, share, licence, home, about.get("revision", "–"), 0 if is_made else len(own), size])
        if not is_made:
            files += [[name, _name(file, about), size] for file, size, _ in own[:FILES_SHOWN]]
            if more := own[FILES_SHOWN:]:
                files.append([name, f"and {len(more):,} more, see manifest.json", sum(size for _, size, _ in more)])
    titles = ["source", "weight in a run", "licence", "from", "revision", "files", "bytes of files"]
    return [_table(titles, rows), _table(["source", "file", "bytes"], files) if files else ""]


def _is_on_disk(name: str) -> bool:
    return Path(name).is_absolute()


def _name(file: str, about: Mapping[str, Any]) -> str:
    """Return the name of a file in its source; where the source lies on some disk is nobody else's business."""
    place = about.get("config", {}).get("path")
    if place and Path(file).is_relative_to(place) and Path(file) != Path(place):
        return Path(file).relative_to(place).as_posix()
    return Path(file).name if _is_on_disk(file) or place else file


def _without_places(value: Any) -> Any:
    """Return a config with names of files and folders in place of their paths."""
    if isinstance(value, Mapping):
        is_place = {key: key in ("path", "root") and isinstance(item, str) for key, item in value.items()}
        return {key: Path(item).name if is_place[key] else _without_places(item) for key, item in value.items()}
    return [_without_places(item) for item in value] if isinstance(value, list) else value


def _counts(sources: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [name, split, found["documents"], found["tokens"], found["bytes"], f"{found['bytes'] / max(1, found['tokens']):.2f}"]
        for name, source in sources.items()
        for split, found in source["splits"].items()
        if found["documents"]
    ]
    return _table(["source", "split", "documents", "tokens", "bytes of text", "bytes per token"], rows)


def _held_out(sources: Mapping[str, Mapping[str, Any]], named: Mapping[str, Any]) -> Iterable[str]:
    yield "## Held out"
    rows: list[list[object]] = []
    for name, source in sources.items():
        content = source["content"]
        share = f"{content['holdout_fraction']:.2%} of the documents, by hash" if content["holdout_fraction"] else "nothing"
        rule = share if content["validation"] is None else "documents of its own"
        rows.append([name, rule, source["splits"].get("validation", {}).get("documents", 0), source["dropped_copies"]])
    for name, entry in named.items():
        rows.append([name, "a validation set by itself", entry["splits"].get("validation", {}).get("documents", 0), 0])
    yield _table(["source", "held out", "documents", f"dropped as {HELD_OUT}"], rows)
    if named:
        yield "What is in a validation set is in the training data of no source, nor are copies of it."
        return
    yield (
        "The hash is of the text without case and spacing, so a document and its copies are on the same side. What one source "
        "holds out is in the training data of none."
    )
    if len({source["content"]["holdout_fraction"] for source in sources.values()}) > 1:
        yield (
            "Sources hold out different shares. Where one that holds out more is too large to list what it holds out, the others "
            "also lose the documents that it would hold out if it had them."
        )


def _left_out(sources: Mapping[str, Mapping[str, Any]], found: Mapping[str, _Found]) -> Iterable[str]:
    rows, examples = [], []
    rules: dict[str, list[str]] = {}
    for name, source in sources.items():
        reasons = {"empty": source["empty_documents"], HELD_OUT: source["dropped_copies"], **source["dropped"]}
        read = max(1, found[name].documents)
        rows += [[name, reason, count, f"{count / read:.3%}"] for reason, count in reasons.items() if count]
        for reason, texts in found[name].examples.items():
            if reason != EXAM:
                examples += [f"- {_plain(name)}, {reason}: {_plain(text)} …" for text in texts]
        rules.setdefault(_rules(source["content"]["options"].get("clean")), []).append(name)
    yield _table(["sources", "what was looked for"], [[", ".join(names), rule] for rule, names in rules.items()])
    yield _table(["source", "reason", "documents", "of those read"], rows) if rows else "Nothing."
    if any(EXAM in source["dropped"] for source in sources.values()):
        yield "Documents with exam questions are not shown, so that this card does not spread them."
    if examples:
        yield "How some of the others begin:"
        yield "\n".join(sorted(examples))
    if any(source["content"]["options"].get("clean", {}).get("languages") for source in sources.values()):
        yield (
            f"The language of a document is told from its first {LANGUAGE_CHARACTERS:,} characters; where it has fewer than "
            f"{LANGUAGE_WORDS} words, it is kept."
        )


def _rules(clean: Mapping[str, Any] | None) -> str:
    """Return what the cleaning of a source leaves out."""
    if clean is None:
        return "empty documents"
    most = f" or more than {clean['max_words']:,}" if clean["max_words"] is not None else ""
    rules = [f"texts of fewer than {clean['min_words']:,}{most} words"]
    if clean["max_symbols"] < 1:
        rules.append(f"of more than {clean['max_symbols']:.0%} symbols")
    if clean["max_repetition"] < 1:
        rules.append(f"that repeat more than {clean['max_repetition']:.0%} of their sequences of 5 words")
    if clean["languages"]:
        rules.append(f"documents in other languages than {', '.join(clean['languages'])}")
    if clean["duplicates"] != "keep":
        near = f", and near copies, with about {clean['similarity']:.0%} of their sequences of 5 words in common"
        rules.append(f"copies (equal but for case and spacing{near if clean['duplicates'] == 'near' else ''})")
    return f"{', '.join(['empty documents', *rules])} (rules {clean['rules']})"


def _exams(sources: Mapping[str, Mapping[str, Any]], read: Mapping[str, _Found]) -> Iterable[str]:
    rows, found = [], set[str]()
    for name, source in sources.items():
        clean = source["content"]["options"].get("clean") or {}
        given = (source["about"].get("config", {}).get("clean") or {}).get("exams", [{}] * len(clean.get("exams", [])))
        exams = [_exam(exam, config) for exam, config in zip(clean.get("exams", []), given, strict=True)]
        items = read[name].items
        found.update(items)
        dropped = "dropped" if clean.get("exam_questions") == "drop" else "kept"
        rows.append([name, ", ".join(exams) or "not checked", len(items) if exams else "–", dropped if exams else "–"])
    yield _table(["source", "checked for", "items found", "documents with them were"], rows)
    if all(row[1] == "not checked" for row in rows):
        return
    yield (
        f"An item counts as found where a document has at least {COVERAGE:.0%} of the sequences of {SEQUENCE_WORDS} words of its "
        "question or passage; case, punctuation and the exam's own phrases do not count. A question of fewer words must stand "
        f"there whole, with half of its options (or its answer) within {OPTIONS_WITHIN} words; one of fewer than {LEAST_WORDS} "
        "words is not looked for. Rewordings and translations are not found."
    )
    if found:
        some = ", ".join(f"`{item}`" for item in sorted(found)[:ITEMS_SHOWN])
        more = f" and {len(found) - ITEMS_SHOWN:,} more" if len(found) > ITEMS_SHOWN else ""
        yield f"Found: {some}{more}. `exams.json` has all of them, and all that were looked for."


def _exam(exam: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return the name of an exam that was looked for, with its file where it was not read by name."""
    file = f" ({Path(config['path']).name})" if config.get("path") else ""
    return f"{exam['type']} {exam['split']}".strip() + file


def _recipe(manifest: Mapping[str, Any]) -> Iterable[str]:
    configs = [_config(source) for source in manifest["sources"].values()]
    sets = [_config(entry) for entry in manifest["validation"].values()]
    if not all([*configs, *sets]):
        return
    data = configs[0]
    if len(configs) > 1:
        of_all = {
            key: configs[0][key]
            for key in ("clean", "no_benchmark_contamination")
            if all(config.get(key) == configs[0].get(key, config) for config in configs)
        }
        own = [{key: value for key, value in config.items() if key not in of_all} for config in configs]
        data = {"type": "mixture", **of_all, "sources": own}
    recipe = {"data": data, **({"validation": sets} if sets else {}), "tokenizer": {"path": "tokenizer.json"}}
    yield (
        "Write these lines into `RECIPE.yaml`. Beside it must be the tokenizer that is beside this card and, under the names in "
        "the recipe, the files or folders of files above:"
    )
    yield f"```yaml\n{dump_yaml(recipe).rstrip()}\n```"
    yield "```sh\nosler data prepare RECIPE.yaml --out FOLDER\n```"


def _config(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a source that gives the same documents again, without places on some disk."""
    given = entry["about"].get("config", {})
    config = {key: value for key, value in given.items() if key not in ("streaming", "disk_budget_gb")}
    commit = entry["content"]["options"].get("commit")
    return {**_without_places(config), **({"revision": commit} if commit else {})}
