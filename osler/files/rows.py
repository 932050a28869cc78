"""Read what people have: texts, and rows of parquet or JSON lines, plain or compressed.

Training data, exams and questions piped into a chat are all read here, so that a file means the same everywhere. Whatever is
wrong raises a UserError that names the file and the line, row or byte. Reading takes time in proportion to the size of the
file, however long its lines are, and memory for one line or one batch of rows.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from osler.files.find import PARQUET_ENDING, compression, ending, log_once, shown
from osler.files.parts import File, LocalFile, Part
from osler.runtime.errors import UserError

if TYPE_CHECKING:
    import pyarrow

BLOCK_BYTES = 1 << 20
MOST_NULS = 0.1  # the largest share of NULs in a text; UTF-16 has about half
BATCH_ROWS, BATCH_BYTES = 1024, 1 << 23  # the most of a parquet file that is in memory at once, whichever is less
BUFFER_BYTES = 1 << 20  # how much of each column of a parquet file is read at once
TEXT_BYTES = 1 << 22  # the longest document of a text file; a longer file is several documents
HEAD_BYTES = 4096  # how much of a file of JSON lines is searched for the bracket that begins an array
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # a surrogate, which alone can write half a character; whole pairs match too

# Words in the names of columns that say something about a row and are not its content.
_BOOKKEEPING = re.compile(
    r"(?:^|_)(?:id|ids|idx|index|uid|uuid|hash|url|uri|link|path|file|filename|source|dump|date|time|timestamp|created|updated"
    r"|license|licence|lang|language|split|subset|version)(?:$|_)",
    re.IGNORECASE,
)


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


def read_texts(source: Path | Part) -> Iterator[str]:
    """Yield the content of a text file without a byte order mark, cut at ends of lines where it is longer than `TEXT_BYTES`."""
    file = _part(source).file
    line, position = 1, 0  # where the next document begins
    rest = b""
    with _os_errors_named(file.name), _open(file) as stream:
        while True:
            data = rest + stream.read(TEXT_BYTES - len(rest))
            is_last = len(data) < TEXT_BYTES or not (more := stream.read(1))
            cut = len(data) if is_last else data.rfind(b"\n") + 1 or _last_character(data)
            text, rest = data[:cut], data[cut:] + (b"" if is_last else more)
            yield _decode_text(text, file.name, line, position)
            if is_last:
                break
            if not position:
                log_once(f"{file.name} is long: it is learned as documents of {TEXT_BYTES >> 20} MiB, cut at ends of lines.")
            line, position = line + text.count(b"\n"), position + len(text)
    file.check()


def _last_character(data: bytes) -> int:
    """Return where the last UTF-8 character begins; the end of ``data`` may cut it in two."""
    return max((place for place in range(len(data) - 4, len(data)) if data[place] & 0xC0 != 0x80), default=len(data))


def _decode_text(data: bytes, name: str, line: int, position: int) -> str:
    """Return a document of a text file as text, given the number of its first line and the position of its first byte."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(f"{name}:{line + data.count(bytes([10]), 0, error.start)}", error, position)) from None
    if text.count("\0") > MOST_NULS * len(text):
        raise UserError(f"{name} holds NUL bytes, so it is probably UTF-16 or no text. Convert the file to UTF-8.")
    return text if position else text.removeprefix("\ufeff")


def read_rows(source: Path | Part, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a file, or of a part of one, of parquet or JSON lines; `columns` None reads all columns.

    A column that does not exist is missing from `Row.values`; the caller decides whether that is an error. Raises UserError when
    the file changes while it is read.
    """
    part = _part(source)
    yield from part.dealt(_parquet_rows(part, columns) if ending(part.file.name) == PARQUET_ENDING else _json_rows(part, columns))
    part.file.check()


def _part(source: Path | Part) -> Part:
    return source if isinstance(source, Part) else Part(LocalFile.at(source))


def decode_lines(lines: Iterable[bytes], name: str, start: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the place and the text of each line; the first begins at byte ``start``. Raises UserError when a line is not UTF-8.

    The place is the number of the line if the file is read from its beginning, else the byte at which the line begins.
    """
    offset = start
    for number, line in enumerate(lines, 1):
        where = f"{name}, line at byte {offset}" if start else f"{name}:{number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(where, error, offset)) from None
        offset += len(line)
        yield where, text.removeprefix("\ufeff")  # joined files have this mark on later lines


def _open(file: File) -> io.BufferedReader:
    """Open a file for reading its decompressed bytes; reading raises OSError where a compressed file is torn."""
    handle, packing = file.open(), compression(file.name)
    if packing is None:
        return handle
    if file.size == 0:  # pyarrow would read nothing and raise no error
        raise UserError(f"{file.name} cannot be read, it may be torn: it is empty, which no compressed file is. Copy it again.")
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(handle, compression=packing), BLOCK_BYTES)  # pyarrow's reads may be short


@contextlib.contextmanager
def _os_errors_named(name: str) -> Iterator[None]:
    """Turn an OSError of the system or of pyarrow into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(_damaged(name, error)) from None


def _lines_between(stream: IO[bytes], start: int, stop: int | None) -> tuple[int, Iterator[bytes]]:
    """Return the lines that begin at byte ``start`` or later and before ``stop``, and where the first of them begins.

    A line that began earlier is passed over and not put together.
    """
    place = max(0, start - 1)
    if start:
        stream.seek(place)
        while (stop is None or place < stop) and (piece := stream.readline(BLOCK_BYTES)):
            place += len(piece)
            if piece.endswith(b"\n"):
                break

    def lines(place: int) -> Iterator[bytes]:
        while (stop is None or place < stop) and (line := stream.readline()):
            yield line
            place += len(line)

    return place, lines(place)


def _not_utf8(where: str, error: UnicodeDecodeError, offset: int) -> str:
    """Return the message about a byte that is not UTF-8, in a text that begins at byte `offset` of what `where` names."""
    byte, position = error.object[error.start], offset + error.start
    return f"{where} is not UTF-8 text: byte 0x{byte:02x} at position {position}. Convert the file to UTF-8."


def _damaged(name: str, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} cannot be read: {error.strerror}. Run the same command again when it can."
    reason = " ".join(str(error).split()).removesuffix(".")  # pyarrow's message may have several lines
    return f"{name} cannot be read, it may be torn or not what its name says: {reason}. Copy or download it again."


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON from its fields, as an ``object_pairs_hook``; raises UserError for one that occurs twice."""
    made = dict(pairs)
    if len(made) != len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise UserError(f"the field {name!r} occurs twice; which one is meant? Remove the other.")
    return made


_decode = json.JSONDecoder(object_pairs_hook=unique_fields).decode


def _json_rows(part: Part, columns: Sequence[str] | None) -> Iterator[Row]:
    name = part.file.name
    with _os_errors_named(name), _open(part.file) as stream:
        head = b"" if part.start else stream.peek(HEAD_BYTES)
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):  # an array on one line could fill the memory
            raise UserError(f"{name} begins with '['. {_one_object_per_line('[')}")
        is_first = columns is not None and not part.start
        start, lines = _lines_between(stream, part.start, part.stop)
        for where, text in decode_lines(lines, name, start):
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
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
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
    """Refuse half of a surrogate pair ("\\ud83e"), which JSON can write and UTF-8 cannot. No recursion: nesting may be deep."""
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
    """Return the columns with content that were not asked for."""
    return [name for name in content if columns is not None and name not in columns and not _BOOKKEEPING.search(name)]


def _parquet_rows(part: Part, columns: Sequence[str] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet
    from pyarrow import types

    is_number = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_temporal)
    name = part.file.name
    try:
        known = {"buffer_size": BUFFER_BYTES, "metadata": _metadata(part.file)}
        with part.file.open() as handle, pyarrow.parquet.ParquetFile(handle, **known) as table:
            schema = table.schema_arrow
            wanted = schema.names if columns is None else [name for name in dict.fromkeys(columns) if name in schema.names]
            for column in wanted:
                if schema.names.count(column) > 1:
                    raise UserError(f"{name} has two columns '{shown(column)}'; which one is meant? Rename the other.")
            unread = _unread([field.name for field in schema if not any(check(field.type) for check in is_number)], columns)
            groups, number, batch_rows = _row_groups(table.metadata, part)
            for batch in table.iter_batches(batch_size=batch_rows, row_groups=groups, columns=wanted) if groups else ():
                values = [_column_values(batch.column(column), column, name, number) for column in wanted]
                for row in zip(*values, strict=True) if wanted else [()] * batch.num_rows:
                    number += 1
                    where = f"{name}: row {number}"
                    yield Row(where, dict(zip(wanted, row, strict=True)), schema.names, unread if number == 1 else ())
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(_damaged(name, error)) from None


@functools.lru_cache(4)
def _metadata(file: File) -> Any:
    """Return the footer of a parquet file. A large file has megabytes of it, and all its parts need them."""
    import pyarrow.parquet

    with file.open() as handle:
        return pyarrow.parquet.read_metadata(handle)


def _row_groups(metadata: Any, part: Part) -> tuple[list[int], int, int]:
    """Return the row groups of a part of a parquet file, the number of rows before them, and how many rows to read at once."""
    groups, rows_before, position, rows, size = [], 0, 0, 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        begin = min(position, part.file.size - 1)  # so each group is in one part, even if the sizes in a damaged file are wrong
        if part.start <= begin and (part.stop is None or begin < part.stop):
            groups.append(number)
            rows, size = rows + group.num_rows, size + group.total_byte_size
        elif not groups:
            rows_before += group.num_rows
        position += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
    return groups, rows_before, max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))


def _column_values(column: pyarrow.Array, name: str, file: str, rows_before: int) -> list[Any]:
    with contextlib.suppress(ValueError):  # text that is not UTF-8, or a value that Python cannot hold
        return list(column.to_pylist())
    values = []
    for row, value in enumerate(column, rows_before + 1):
        where = f"{file}: row {row}, field '{shown(name)}'"
        try:
            values.append(value.as_py())
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(where, error, 0)) from None
        except ValueError as error:
            raise UserError(f"{where} cannot be read: {error}.") from None
    return values
