"""Local files as documents: parquet and JSONL tables, text and Markdown, plain or compressed, or folders of any mix.

The idea: reading is lazy and restartable. A source is a path, iterating it opens the files anew and gives the same
documents in the same order (files sorted by name), so whoever needs two passes makes two. A text file is one document,
a table has one per row. Whatever is wrong with a file is a UserError that names the file and the line, row or byte;
nothing is skipped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from osler.data.documents import Document
from osler.errors import UserError
from osler.tokenizer.chat import Turn

TEXT_ENDINGS = (".txt", ".md")
LINES_ENDINGS = (".jsonl", ".ndjson")
PARQUET_ENDING = ".parquet"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

# How tables of questions and answers call their columns, in lower case: what the message about a missing column proposes.
TURN_COLUMNS = {
    "question_field": ("question", "prompt", "instruction"),
    "answer_field": ("answer", "response", "completion", "output"),
    "thinking_field": ("thinking", "reasoning", "rationale", "explanation", "cot", "complex_cot"),
}
CHAT_COLUMNS = {"messages", "conversations", "conversation"}

Row = tuple[str, dict[str, Any]]  # where it stands ("notes.jsonl:12"), and its fields


@dataclass(frozen=True)
class TextFiles:
    """The documents in a file or a folder: whole text files, and the column `field` of tables.

    `path_key` and `field_key` are what the two are called where a person sets them, for messages.
    """

    path: str | Path
    field: str = "text"
    path_key: str = "data.path"
    field_key: str = "data.field"

    def __iter__(self) -> Iterator[Document]:
        for file in find_files(self.path, allow_text=True, key=self.path_key):
            if _ending(file) in TEXT_ENDINGS:
                yield Document(text=_read_text(file), source=str(file), collection=file.name)
            else:
                for where, row in read_rows(file, {self.field: self.field_key}):
                    yield Document(text=row[self.field], source=where, collection=file.name)


@dataclass(frozen=True)
class TurnFiles:
    """The questions and answers in a table file or a folder of them; `thinking_field` None means no reasoning."""

    path: str | Path
    question_field: str = "question"
    thinking_field: str | None = None
    answer_field: str = "answer"

    def __iter__(self) -> Iterator[Document]:
        fields = {self.question_field: "data.question_field", self.answer_field: "data.answer_field"}
        if self.thinking_field is not None:
            fields[self.thinking_field] = "data.thinking_field"
        for file in find_files(self.path, allow_text=False):
            for where, row in read_rows(file, fields):
                thinking = row[self.thinking_field] if self.thinking_field is not None else None
                turn = Turn(row[self.question_field], thinking, row[self.answer_field])
                yield Document(turn=turn, source=where, collection=file.name)


def find_files(path: str | Path, *, allow_text: bool, key: str = "data.path") -> list[Path]:
    """Return the readable files at `path`, sorted, without hidden ones. Raises UserError, naming `key`, when there is none."""
    if not str(path):  # Path("") would be the folder that happens to be the current one
        raise UserError(f"{key} is empty: name a file or a folder of text, such as {key}=MY_TEXTS.")
    path = Path(path)
    endings = (PARQUET_ENDING, *LINES_ENDINGS, *(TEXT_ENDINGS if allow_text else ()))
    if path.is_file():
        if _ending(path) not in endings:
            raise UserError(f"{path} is of a kind that cannot be read here; give a file that ends in {_listed(endings)}.")
        return [path]
    if not path.is_dir():
        raise UserError(f"There is no file or folder {path}; set {key} to one that is there.")
    files = [file for file in path.rglob("*") if file.is_file() and _ending(file) in endings]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise UserError(f"The folder {path} holds no file that can be read: none ends in {_listed(endings)}.")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def read_rows(file: Path, fields: Mapping[str, str]) -> Iterator[Row]:
    """Yield each row's `fields`, all of them text ("" for null), with where it stands.

    `fields` gives for each column the key that chooses it; the UserError about a column that is missing names it.
    """
    return _read_parquet(file, fields) if _ending(file) == PARQUET_ENDING else _read_json_lines(file, fields)


def _listed(endings: Sequence[str]) -> str:
    """The endings as a person reads them, each with its compressions."""
    packed = [f"{ending}{compression}" for ending in endings if ending != PARQUET_ENDING for compression in COMPRESSIONS]
    return f"{', '.join(endings)}, or compressed in {', '.join(packed)}"


def _ending(file: Path) -> str:
    """The ending that tells the kind of a file, below a compression's ending; parquet compresses inside."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] != PARQUET_ENDING:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _open(file: Path) -> IO[bytes]:
    """Open for reading bytes, decompressing on the way; a torn compressed file raises OSError while it is read."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    stream: IO[bytes] = pyarrow.input_stream(str(file), compression=compression)
    return stream


def _read_text(file: Path) -> str:
    try:
        with _open(file) as stream:
            data = stream.read()
    except OSError as error:
        raise UserError(_damaged(file, error)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(_not_utf8(f"{file}:{line}", error.object[error.start], error.start)) from None


def _read_json_lines(file: Path, fields: Mapping[str, str]) -> Iterator[Row]:
    offset = 0
    try:
        with _open(file) as stream:
            for number, line in enumerate(_lines(stream), 1):
                where = f"{file}:{number}"
                row = _parse_line(line, where, offset)
                offset += len(line)
                if row is not None:
                    yield where, {field: _text_field(row, field, key, where) for field, key in fields.items()}
    except OSError as error:
        raise UserError(_damaged(file, error)) from None


def _lines(stream: IO[bytes], block_bytes: int = 1 << 20) -> Iterator[bytes]:
    """Cut a stream into lines at newlines only: pyarrow's own line iteration is not available on compressed streams."""
    rest = b""
    while block := stream.read(block_bytes):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


def _parse_line(line: bytes, where: str, offset: int) -> dict[str, Any] | None:
    try:
        text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(where, error.object[error.start], offset + error.start)) from None
    if not text.strip():
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); every line must hold one JSON object.") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} holds a JSON {type(row).__name__}; every line must hold one JSON object.")
    return row


def _text_field(row: dict[str, Any], field: str, key: str, where: str) -> str:
    if field not in row:
        raise UserError(_no_field(where, field, key, list(row)))
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: the field '{field}' must be text, but it is {type(value).__name__}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair: "\ud83e"
        raise UserError(f"{where}: the field '{field}' holds half a character at position {error.start}.") from None
    return value


def _read_parquet(file: Path, fields: Mapping[str, str]) -> Iterator[Row]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _check_columns(file, table.schema_arrow, fields)
            for batch in table.iter_batches(batch_size=1024, columns=list(fields)):
                columns = [_column_texts(batch.column(field), field, file, number) for field in fields]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield f"{file}: row {number}", dict(zip(fields, values, strict=True))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(_damaged(file, error)) from None


def _check_columns(file: Path, schema: pyarrow.Schema, fields: Mapping[str, str]) -> None:
    for field, key in fields.items():
        if field not in schema.names:
            raise UserError(_no_field(str(file), field, key, schema.names))
        kind = schema.field(field).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        is_text: list[Callable[[pyarrow.DataType], bool]] = [
            pyarrow.types.is_string,
            pyarrow.types.is_large_string,
            pyarrow.types.is_string_view,
        ]
        if not any(check(kind) for check in is_text):
            raise UserError(f"{file}: the field '{field}' must be text, but it is {kind}.")


def _column_texts(column: pyarrow.Array, field: str, file: Path, rows_before: int) -> list[str]:
    try:
        return [text or "" for text in column.to_pylist()]
    except UnicodeDecodeError:
        for index, value in enumerate(column):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                where = f"{file}: row {rows_before + index + 1}, field '{field}'"
                raise UserError(_not_utf8(where, error.object[error.start], error.start)) from None
        raise


def _no_field(where: str, field: str, key: str, columns: Sequence[str]) -> str:
    """What is there instead of a column, and which keys would read it."""
    found = f"{where} has no field '{field}'; it has: {', '.join(columns) or 'none'}."
    settings = _turn_settings(columns, key) if key.startswith("data.") else None
    if key == "data.thinking_field":
        likely = [column for column in columns if column.lower() in TURN_COLUMNS["thinking_field"]]
        name = f"={likely[0]}" if likely else " to the column that holds the reasoning"
        return f"{found} Set {key}{name}, or {key}=null where there is no reasoning."
    if settings is not None:
        other = f", or {key}=NAME to learn one column as text" if key == "data.field" else ""
        return f"{found} These look like questions and answers: set {settings}{other}."
    if key.startswith("data.") and CHAT_COLUMNS.intersection(columns):
        return (
            f"{found} Lists of chat messages are not read: write one row with a question and an answer for each exchange, "
            "and set data.type=turns."
        )
    if key == "data.field":
        return f"{found} Set {key}=NAME to the column of text, or data.type=turns for rows of questions and answers."
    return f"{found} Set {key}=NAME to the column that holds it."


def _turn_settings(columns: Iterable[str], missing: str) -> str | None:
    """The keys under which these columns are questions and answers, `missing` among them; None when they look otherwise."""
    lower = {column.lower(): column for column in columns}
    named = {key: next((lower[name] for name in names if name in lower), None) for key, names in TURN_COLUMNS.items()}
    if named["question_field"] is None or named["answer_field"] is None:
        return None
    settings = ["data.type=turns"]
    for key, column in named.items():
        by_default = column == key.removesuffix("_field") and key != "thinking_field"  # which is null by default
        if column is not None and (not by_default or missing == f"data.{key}"):
            settings.append(f"data.{key}={column}")
    if named["thinking_field"] is None and len(lower) > 2:
        settings.append("(and data.thinking_field=NAME if one of the others is the reasoning)")
    return " ".join(settings)


def _not_utf8(where: str, byte: int, position: int) -> str:
    return f"{where} is not UTF-8 text: byte 0x{byte:02x} at position {position}. Convert the file to UTF-8."


def _damaged(file: Path, error: Exception) -> str:
    return f"{file} cannot be read, it may be torn or not what its name says: {error}. Copy or download it again."
