"""Find and read what people have: texts, and rows of parquet or JSON lines, plain or compressed.

Training data, exams and questions piped into a chat are all read here, so that a file means the same everywhere. Whatever is
wrong raises a UserError that names the file and the line, row or byte. Reading takes time in proportion to the size of the
file, however long its lines are, and memory for one line or one batch of rows.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from osler.runtime.errors import UserError

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

PARQUET_ENDING = ".parquet"
ROW_ENDINGS = (PARQUET_ENDING, ".jsonl", ".ndjson")
TEXT_ENDINGS = (".txt", ".md")
# A file that is named itself is read as JSON lines. In a folder it is more often a description of the files than one of them.
NAMED_ONLY_ENDING = ".json"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NAMES_SHOWN = 3  # of folders that cannot be opened
BLOCK_BYTES = 1 << 20
MOST_DIGITS = 640  # of an integer that Python surely converts: the least that sys.set_int_max_str_digits takes
MOST_NULS = 0.1  # of the characters of a text; in UTF-16 it is about half
BATCH_ROWS = 1024
HEAD_BYTES = 4096  # of a file of JSON lines, to see whether it begins with an array
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # a surrogate, the only way to write half a character; pairs match too

# Columns that say something about a row and are not its content, by the words of their names.
_BOOKKEEPING = re.compile(
    r"(?:^|_)(?:id|ids|idx|index|uid|uuid|hash|url|uri|link|path|file|filename|source|dump|date|time|timestamp|created|updated"
    r"|license|licence|lang|language|split|subset|version)(?:$|_)",
    re.IGNORECASE,
)


def find_files(path: str | Path, endings: Sequence[str], *, key: str) -> list[Path]:
    """Return the files at `path` with one of these `endings`, sorted, and log what is left out ("3 .json, 1 .csv").

    Capitals do not matter, and the ending of a compression may follow. A folder is searched with all its subfolders. Links to
    folders are followed, but each folder is read once, so circles end.
    Raises UserError, which names the config key of the path, when there is none.
    """
    if not str(path):  # Path("") would be the current folder
        raise UserError(f"{key} is empty: name a file or a folder, such as {key}=MY_TEXTS.")
    path = Path(path)
    packed = [kind + compression for kind in endings if kind != PARQUET_ENDING for compression in COMPRESSIONS]
    readable = f"{', '.join(endings)}, or compressed {', '.join(packed)}"
    if os.path.isfile(path):
        if ending(path) not in (*endings, NAMED_ONLY_ENDING):
            raise UserError(f"{shown(path)} is of a kind that cannot be read here; give a file that ends in {readable}.")
        return [path]
    if not os.path.isdir(path):
        raise UserError(f"There is no file or folder {shown(path)}; set {key} to one that exists.")
    files, left_out = _walk(path, endings)
    if not files:
        reason = f"left out: {left_out}" if left_out else "it is empty"
        raise UserError(f"The folder {shown(path)} holds no file that can be read ({reason}). Readable files end in {readable}.")
    if left_out:
        log_once(f"{shown(path)}: left out: {left_out}.")
    return files


@cache
def log_once(text: str) -> None:
    """Log what this process has not logged before: files are read several times, and one line about them is enough."""
    logger.info(text)


def ending(file: Path) -> str:
    """Return the ending that tells the kind of a file, without that of a compression; parquet files compress inside."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSIONS and suffixes[-2] != PARQUET_ENDING:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def shown(name: str | Path) -> str:
    """Return a name that can be printed anywhere: bytes that are not UTF-8 and control characters are escaped."""
    name = str(name)
    return name if name.isprintable() else repr(name)[1:-1]


def _walk(root: Path, endings: Sequence[str]) -> tuple[list[Path], str]:
    """Return the files in a folder, and in words what is left out; first real folders are searched, then linked ones."""
    files: list[Path] = []
    others: Counter[str] = Counter()
    unopened: list[OSError] = []
    seen: set[tuple[int, int]] = set()
    starts = [root]
    for start in starts:  # grows by the links that are found
        for folder, folders, names in os.walk(start, onerror=unopened.append):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                others["linked twice"] += 1
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            others["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
            folders[:] = [name for name in folders if not name.startswith(".")]
            starts += [Path(folder, name) for name in sorted(folders) if os.path.islink(os.path.join(folder, name))]
            for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
                if os.path.isfile(path) and ending(path) in endings:
                    files.append(path)
                else:
                    others[_kind(path)] += 1
    left_out = [f"{count:,} {what}" for what, count in others.most_common() if count]
    if unopened:
        shortened = [f"{shown(error.filename)} ({error.strerror})" for error in unopened[:NAMES_SHOWN]]
        more = ", ..." if len(unopened) > NAMES_SHOWN else ""
        left_out.append(f"{len(unopened):,} that cannot be opened: {', '.join(shortened)}{more}")
    return sorted(files, key=lambda file: file.relative_to(root).as_posix()), ", ".join(left_out)


def _kind(path: Path) -> str:
    """Return the name of the kind of a file that is left out."""
    if not os.path.isfile(path):
        return "linked nowhere" if path.is_symlink() else "neither file nor folder"
    is_packed = len(path.suffixes) > 1 and path.suffix.lower() in COMPRESSIONS
    return shown("".join(path.suffixes[-2:] if is_packed else path.suffixes[-1:]).lower()) or "without an ending"


@dataclass(frozen=True)
class Row:
    """One row of a table: where it is ("notes.jsonl:12") and the values of its columns.

    `columns` names all columns of the row. In the first row of a file, `unread` names the columns that were not asked for and
    look like content: they hold text, lists or objects.
    """

    where: str
    values: dict[str, Any]
    columns: Sequence[str]
    unread: Sequence[str] = ()


def read_text(file: Path) -> str:
    """Return the content of a text file, without a byte order mark."""
    with _os_errors_named(file), _open(file) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(_not_utf8(f"{shown(file)}:{line}", error, 0)) from None
    if text.count("\0") > MOST_NULS * len(text):
        raise UserError(f"{shown(file)} holds NUL bytes, so it is probably UTF-16 or no text. Convert the file to UTF-8.")
    return text


def read_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a parquet file or a file of JSON lines; `columns` None reads all of them.

    A column that does not exist is missing from `Row.values`; the caller decides whether that is an error.
    """
    return _parquet_rows(file, columns) if ending(file) == PARQUET_ENDING else _json_rows(file, columns)


def decode_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, str]]:
    """Yield where each line is and its text. Raises UserError when a line is not UTF-8."""
    offset = 0
    for number, line in enumerate(lines, 1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(where, error, offset)) from None
        offset += len(line)
        yield where, text.removeprefix("\ufeff")  # joined files have one on later lines


def _open(file: Path) -> IO[bytes]:
    """Open a file for reading its decompressed bytes; reading raises OSError where a compressed file is torn."""
    handle = open(file, "rb")  # noqa: SIM115 - Python takes names that are not UTF-8, pyarrow does not; the stream closes it
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return handle
    if file.stat().st_size == 0:  # pyarrow reads nothing from it without an error
        raise UserError(f"{shown(file)} cannot be read, it may be torn: it is empty, which no compressed file is. Copy it again.")
    import pyarrow

    stream: IO[bytes] = pyarrow.input_stream(handle, compression=compression)
    return stream


@contextlib.contextmanager
def _os_errors_named(file: Path) -> Iterator[None]:
    """Turn an OSError of the system or of pyarrow into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(_damaged(file, error)) from None


def _lines(stream: IO[bytes], head: bytes = b"") -> Iterator[bytes]:
    """Cut a stream, after the ``head`` read of it, at newlines and nowhere else, which pyarrow cannot where it is compressed."""
    parts: list[bytes] = []  # of a line longer than a block, joined once
    while block := head or stream.read(BLOCK_BYTES):
        first, *others = block.split(b"\n")
        parts.append(first)
        for line in others:
            yield b"".join(parts) + b"\n"
            parts = [line]
        head = b""
    if any(parts):
        yield b"".join(parts)


def _not_utf8(where: str, error: UnicodeDecodeError, offset: int) -> str:
    byte, position = error.object[error.start], offset + error.start
    return f"{where} is not UTF-8 text: byte 0x{byte:02x} at position {position}. Convert the file to UTF-8."


def _damaged(file: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{shown(file)} cannot be read: {error.strerror}."
    reason = " ".join(str(error).split()).removesuffix(".")  # pyarrow's may have several lines
    return f"{shown(file)} cannot be read, it may be torn or not what its name says: {reason}. Copy or download it again."


class _RepeatedKeyError(ValueError):
    """A JSON object has a key twice."""


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _RepeatedKeyError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return made


def _json_integer(digits: str) -> int | float:
    """Return an integer; one with more digits than Python converts is infinite, which only matters where it is read."""
    return int(digits) if len(digits) < MOST_DIGITS else float(digits)


_decode = json.JSONDecoder(object_pairs_hook=_json_object, parse_int=_json_integer).decode


def _json_rows(file: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    name = shown(file)
    with _os_errors_named(file), _open(file) as stream:
        head = stream.read(HEAD_BYTES)
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):  # its first line may be larger than the memory
            raise UserError(f"{name} begins with '['. {_one_object_per_line('[')}")
        is_first = columns is not None
        for where, text in decode_lines(_lines(stream, head), name):
            if not text.strip():
                continue
            row = _parse(text, where)
            if HALF_CHARACTER.search(text):
                _check_characters(row if columns is None else {name: row.get(name) for name in columns}, where)
            content = [name for name, value in row.items() if not isinstance(value, (int, float))] if is_first else []
            yield Row(where, row, list(row), _unread(content, columns))
            is_first = False


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        row = _decode(text)
    except _RepeatedKeyError as error:
        raise UserError(f"{where}: the field {str(error)!r} occurs twice; which one is meant? Remove the other.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}). {_one_object_per_line(text)}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} holds a JSON {type(row).__name__}. {_one_object_per_line(text)}")
    return row


def _one_object_per_line(text: str) -> str:
    """Return the rule for lines of JSON, and how to convert a text that breaks it."""
    rule = "Every line must hold one JSON object"
    if text.lstrip().startswith("["):
        code = "import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]"
        return f'{rule}; turn an array into such lines with: python -c "{code}" < ARRAY.json > ROWS.jsonl'
    if text.strip() == "{":
        return f"{rule}, not a part of one; turn indented objects into such lines with: jq -c . INDENTED.json > ROWS.jsonl"
    return f"{rule}."


def _check_characters(row: dict[str, Any], where: str) -> None:
    """Refuse half of a surrogate pair ("\\ud83e"), which JSON can write and UTF-8 cannot; by a list, as nesting may be deep."""
    waiting: list[tuple[str, Any]] = list(row.items())
    while waiting:
        field, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{field}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(field, inner) for inner in value]
        elif isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                what = f"the field '{shown(field)}' holds half a character at position {error.start}"
                raise UserError(f"{where}: {what}. Write it whole, or remove the row.") from None


def _unread(content: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    """Return those of the columns with content that were not asked for."""
    return [name for name in content if columns is not None and name not in columns and not _BOOKKEEPING.search(name)]


def _parquet_rows(file: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet
    from pyarrow import types

    is_number = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_temporal)
    number = 0
    try:
        with open(file, "rb") as handle, pyarrow.parquet.ParquetFile(handle) as table:
            schema = table.schema_arrow
            wanted = schema.names if columns is None else [name for name in dict.fromkeys(columns) if name in schema.names]
            for name in wanted:
                if schema.names.count(name) > 1:
                    raise UserError(f"{shown(file)} has two columns '{shown(name)}'; which one is meant? Rename the other.")
            unread = _unread([field.name for field in schema if not any(check(field.type) for check in is_number)], columns)
            for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=wanted):
                values = [_column_values(batch.column(name), name, file, number) for name in wanted]
                for row in zip(*values, strict=True) if wanted else [()] * batch.num_rows:
                    number += 1
                    where = f"{shown(file)}: row {number}"
                    yield Row(where, dict(zip(wanted, row, strict=True)), schema.names, unread if number == 1 else ())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(_damaged(file, error)) from None


def _column_values(column: pyarrow.Array, name: str, file: Path, rows_before: int) -> list[Any]:
    with contextlib.suppress(ValueError):  # text that is not UTF-8, or a value that Python cannot hold
        return list(column.to_pylist())
    values = []
    for row, value in enumerate(column, rows_before + 1):
        where = f"{shown(file)}: row {row}, field '{shown(name)}'"
        try:
            values.append(value.as_py())
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(where, error, 0)) from None
        except ValueError as error:
            raise UserError(f"{where} cannot be read: {error}.") from None
    return values
