"""The commands `osler tokenizer` and `osler data`: train, inspect or compare tokenizers, prepare or inspect shards.

Most read the sections ``data``, ``validation`` and ``tokenizer`` of a training recipe, so they see the data that a run trains on.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from osler.config.recipe import load_recipe, override
from osler.config.schema import TAGGED, config, decode
from osler.data.config import ClinicData, TextData, ValidationSets, check_validation
from osler.data.documents import batches
from osler.data.named import SOURCES
from osler.data.prepared import open_folder
from osler.data.readers import TextFiles
from osler.data.shard_set import ShardSet
from osler.data.shards import SPLITS, TOKENIZER, VALIDATION_PREFIX, read_data_manifest
from osler.data.sources import at_known_commits, open_corpora, prepare_sources, train_tokenizer
from osler.data.tokenise import encode
from osler.runtime import format as fmt
from osler.runtime.errors import UserError
from osler.runtime.files import write_atomic
from osler.tokenizer.bpe import Tokenizer
from osler.tokenizer.config import BPEConfig, TokenizerConfig
from osler.tokenizer.round_trip import PROBES, Losses, refuse_missing_bytes

logger = logging.getLogger(__name__)

SHARDS = Path("shards")  # `osler data prepare` writes into a folder in this one, unless --out names another
COMPARED_CHARS = 1 << 18  # about this much text is encoded at a time
SHOWN_TOKENS = 48  # how many of a document
SHOWN_CHARS = 600  # how many of each text of a document
LABELS = {1: ("",), 2: ("question: ", "answer: "), 3: ("question: ", "thinking: ", "answer: ")}  # keys: the number of texts
SECTIONS = ("data", "validation", "tokenizer", "init_from")


@config
class Sections:
    """The sections of a training recipe that are about text."""

    data: Annotated[TextData, TAGGED] = ClinicData()
    validation: ValidationSets = ()
    tokenizer: TokenizerConfig = BPEConfig()
    init_from: str | None = None  # run folder or checkpoint, whose tokenizer replaces the one given here

    def __post_init__(self) -> None:
        check_validation(self.validation, self.data)


def read_sections(recipe: str | None, overrides: Sequence[str], tokenizer_type: str | None = None) -> Sections:
    """Read the sections about text from a recipe; ``recipe`` may also be a named source, or a file or folder of text.

    A ``tokenizer_type`` replaces only the type in the recipe; the size of the vocabulary stays.
    """
    whole: Mapping[str, Any] = {}
    if recipe in SOURCES:
        whole = {"data": {"type": "hub", "name": recipe}}
    elif recipe is not None:
        path = Path(recipe)
        if path.exists() and path.suffix not in (".yaml", ".yml"):
            whole = {"data": {"type": "files", "path": recipe}}
        else:
            whole = load_recipe(recipe, others=SOURCES)
    sections = {name: whole[name] for name in SECTIONS if name in whole}
    if tokenizer_type is not None:
        sections["tokenizer"] = {**sections.get("tokenizer", {}), "type": tokenizer_type}
    given = override(sections, overrides)
    strange = sorted(set(given) - set(SECTIONS))
    if strange:
        raise UserError(
            f"`{strange[0]}` is not about text: this command reads data.KEY=..., validation=[...], tokenizer.KEY=... and "
            "init_from=MODEL."
        )
    data = given.get("data")
    if "data" not in sections and isinstance(data, dict) and "path" in data:
        data.setdefault("type", "files")  # a path without a type is that of text files
    return decode(Sections, given, source=recipe or "")


def tokenizer_train(recipe: str | None, overrides: Sequence[str], type: str | None, out: str) -> int:
    """Train a tokenizer on the text of a recipe and write it to the file ``out``."""
    sections = read_sections(recipe, overrides, type)
    wanted = sections.tokenizer
    if wanted.path is not None:
        raise UserError(f"tokenizer.path={wanted.path} names a tokenizer that exists; leave it out to train one.")
    tokenizer = train_tokenizer(sections.data, wanted, sections.validation)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, tokenizer.to_bytes())
    print(f"{path}: {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}")
    return 0


def tokenizer_inspect(path: str, text: str | None) -> int:
    """Print the properties of a tokenizer, and the tokens of ``text``."""
    tokenizer = Tokenizer.load(path)
    print(f"vocabulary    {tokenizer.vocab_size:,}")
    print(f"fingerprint   {tokenizer.fingerprint}")
    special = sorted(tokenizer.special_ids)
    print(f"special       {', '.join(f'{tokenizer.decode([i])} = {i}' for i in special) or 'none'}")
    losses = Losses()
    with suppress(UserError):  # a tokenizer that loses too much for any run is shown all the same
        losses.look(tokenizer, PROBES)
    print(f"loses         {losses.lost} of {losses.chars:,} characters{f': {losses.examples[True]}' if losses.lost else ''}")
    if text is not None:
        ids = tokenizer.encode(text)
        size = len(text.encode("utf-8"))
        print(f"tokens        {len(ids)} for {size} bytes ({size / max(1, len(ids)):.2f} bytes per token)")
        if (back := tokenizer.decode(ids)) != text:
            print(f"read back as  {back!r}")
        print(f"ids           {' '.join(map(str, ids))}")
        print(f"pieces        {'|'.join(tokenizer.decode([i]) for i in ids)}")
    return 0


def tokenizer_compare(paths: Sequence[str], texts: Sequence[str], field: str) -> int:
    """Print how many bytes of each text a token of each tokenizer stands for, and which tokenizers lose some of the texts."""
    tokenizers, lossy = {path: Tokenizer.load(path) for path in paths}, dict[str, None]()
    rates: dict[str, list[str]] = {path: [] for path in paths}
    for text in texts:
        size, tokens = 0, Counter[str]()
        for batch in batches(TextFiles(text, field, path_key="--text", field_key="--field"), COMPARED_CHARS):
            contents = [document.text for document in batch]
            size += sum(len(content.encode()) for content in contents)
            for path, tokenizer in tokenizers.items():
                encoded = tokenizer.encode_batch(contents)
                tokens[path] += sum(map(len, encoded))
                if any(tokenizer.decode(ids) != content for ids, content in zip(encoded, contents, strict=True)):
                    lossy[path] = None
        if not size:
            raise UserError(f"There is no text in {text} to compare tokenizers on.")
        for path, found in rates.items():
            found.append(f"{size / tokens[path]:.3f}" if tokens[path] else "–")
    rows = [[path, f"{tokenizer.vocab_size:,}", *rates[path]] for path, tokenizer in tokenizers.items()]
    print(fmt.table([["bytes per token", "vocabulary", *(Path(text).name for text in texts)], *rows]))
    for path in lossy:
        print(f"{path} does not give every text back, so its numbers are too good.")
    return 0


def data_prepare(recipe: str | None, overrides: Sequence[str], out: str | None, processes: int | None) -> int:
    """Tokenise the text of a recipe into the folder ``out`` and print what is in it."""
    if processes is not None and processes < 0:
        raise UserError(f"--workers {processes} is no number of processes; give 1 or more, or 0 to work in this process alone.")
    sections = read_sections(recipe, overrides)
    name = Path(recipe).stem if recipe and Path(recipe).exists() else recipe or sections.data.type
    out = out or str(SHARDS / name)
    data, validation = at_known_commits(sections.data, sections.validation, out)
    wanted = sections.tokenizer
    if sections.init_from is not None:
        tokenizer = _tokenizer_of_model(sections.init_from)
    elif wanted.path is not None:
        tokenizer = refuse_missing_bytes(Tokenizer.load(wanted.path)).with_specials()
    else:
        tokenizer = train_tokenizer(data, wanted, validation)
    prepared = prepare_sources(data, tokenizer, out, validation=validation, processes=processes)
    print(f"{out}: {'exists already' if prepared.reused else 'written'}")
    print_splits(out)
    return 0


def _tokenizer_of_model(model: str) -> Tokenizer:
    """Return the tokenizer of a run or checkpoint; a run that starts from it must be fed with the same."""
    from osler.checkpoint import store  # loads torch, which nothing else here needs

    checkpoint = store.load(store.resolve(model), names=[])
    if TOKENIZER not in checkpoint.files:
        raise UserError(f"init_from={model}: {checkpoint.path} has no {TOKENIZER}.")
    logger.info(f"The tokenizer is that of the model in {checkpoint.path}.")
    return Tokenizer.from_bytes(checkpoint.files[TOKENIZER], name=str(checkpoint.path / TOKENIZER))


def data_sources() -> int:
    """Print what is known of every named source."""
    for name, source in SOURCES.items():
        size = f"{source.tokens / 1000:g} B" if source.tokens >= 1000 else f"{source.tokens} M"
        print(f"{name:<20}{source.repo or 'local files only'}, about {size} tokens; {source.licence}")
        facts = {"subsets": source.subsets, "splits": source.splits, "fields": source.fields or ("one text a file",)}
        lists = [f"{what}: {', '.join(values)}" for what, values in facts.items() if any(values)]
        print(" " * 20 + "; ".join(lists))
    return 0


def data_peek(recipe: str | None, overrides: Sequence[str], tokenizer_path: str | None, documents: int) -> int:
    """Print the first documents of each source of a recipe, as text and, with a tokenizer, as tokens."""
    if documents < 1:
        raise UserError(f"--documents {documents} shows nothing; give 1 or more.")
    tokenizer = None if tokenizer_path is None else Tokenizer.load(tokenizer_path).with_specials()
    for name, corpus in open_corpora(read_sections(recipe, overrides).data).items():
        for document in islice(corpus.documents(), documents):
            print(f"--- {name}, {document.where}")
            for label, text in zip(LABELS[len(document.texts)], document.texts, strict=True):
                print(f"{label}{text[:SHOWN_CHARS]}{' ...' if len(text) > SHOWN_CHARS else ''}")
            if tokenizer is not None:
                [(ids, mask)] = encode(tokenizer, [document])
                learned = len(ids) if mask is None else sum(mask)
                print(f"{len(ids):,} tokens, {learned:,} learned: {'|'.join(tokenizer.decode([i]) for i in ids[:SHOWN_TOKENS])}")
    return 0


def data_inspect(folder: str, tokenizer_path: str | None) -> int:
    """Print what a folder of shards holds and check every byte; return 1 when a file is damaged."""
    print_splits(folder)
    tokenizer = None if tokenizer_path is None else Tokenizer.load(tokenizer_path).with_specials()
    damaged = 0
    for title, shards in _splits(folder):
        if tokenizer is not None:
            if tokenizer.fingerprint != shards.tokenizer_fingerprint:
                raise UserError(f"{folder} was made with another tokenizer than {tokenizer_path}.")
            ids, _ = shards.document(0, 0, SHOWN_TOKENS)
            print(f"{title} begins: {tokenizer.decode([int(i) for i in ids])!r}")
        problems = shards.verify()
        damaged += len(problems)
        print("\n".join(problems) if problems else f"{title}: every file is as it was written")
    return 1 if damaged else 0


def _splits(folder: str) -> Iterator[tuple[str, ShardSet]]:
    """Yield the splits of every source and the validation sets, with titles, which name the source if there are several."""
    prepared = open_folder(Path(folder), growing=True)
    for source in prepared.sources:
        for split, shards in zip(SPLITS, (source.train, source.validation), strict=True):
            if shards is not None and shards.num_shards:
                yield split if len(prepared.sources) == 1 else f"{source.name}/{split}", shards
    for name, shards in prepared.named_validation.items():
        if shards.num_shards:
            yield f"{VALIDATION_PREFIX}{name}", shards


def print_splits(folder: str) -> None:
    """Print one line for each split: documents, tokens, tokens that are learned, bytes of text."""
    manifest = read_data_manifest(folder)
    unfinished = "" if manifest["complete"] else "; unfinished"
    print(f"tokenizer {manifest['tokenizer_fingerprint']}, vocabulary {manifest['vocab_size']:,}{unfinished}")
    rows = [["split", "documents", "tokens", "learned", "bytes", "bytes/token"]]
    for title, shards in _splits(folder):
        counts = (shards.num_documents, shards.num_tokens, shards.num_loss_tokens, shards.num_bytes)
        rows.append([title, *(f"{count:,}" for count in counts), f"{shards.num_bytes / max(1, shards.num_tokens):.2f}"])
    print(fmt.table(rows))
