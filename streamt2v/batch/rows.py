"""A file of jobs as rows: JSON lines, TOML, CSV, or one prompt per line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamt2v import config
from streamt2v.errors import ConfigError, InputError


@dataclass(frozen=True)
class Row:
    """One job as written: its line, its fields, and what is wrong with the line itself, if anything."""

    line: int
    fields: dict[str, Any]
    error: str = ""


def read(place: str) -> list[Row]:
    """Read the rows of a file of jobs, or of standard input ("-": JSON lines, or one prompt per line).

    Raises:
        InputError: the file cannot be read. ConfigError: unknown kind of file, invalid content, or no jobs.
    """
    try:
        data = sys.stdin.buffer.read() if place == "-" else Path(place).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the jobs in {place}: {error.strerror or error}") from error
    text = _text(data)
    kind = Path(place).suffix.lower() if place != "-" else ".jsonl" if text.lstrip().startswith("{") else ".txt"
    if kind not in _READERS:
        raise ConfigError(f"{place} is not a file of jobs", f"known: {', '.join(_READERS)}, or - for standard input")
    try:
        rows = list(_READERS[kind](text))
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{place} cannot be read as {kind[1:]}: {error}") from error
    if not rows:
        raise ConfigError(
            f"{place if place != '-' else 'standard input'} holds no jobs",
            "write one prompt per line, or rows as in `streamt2v batch --help`",
        )
    return rows


_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"}
_MARKS |= {codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig"}


def _text(data: bytes) -> str:
    """Decode by the byte order mark; without one, as UTF-16 if every other byte is 0, else as UTF-8.

    Invalid UTF-8 is kept as it is; the check of its row names it.
    """
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and len(data) >= 8:
        even, odd = data[:64:2].count(0), data[1:64:2].count(0)
        encoding = "utf-16-le" if odd > 24 * min(64, len(data)) // 64 else encoding
        encoding = "utf-16-be" if even > 24 * min(64, len(data)) // 64 else encoding
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return data.decode(encoding, errors=errors)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _read_text(text: str) -> Iterator[Row]:
    return (Row(number, {"prompt": line}) for number, line in _lines(text))


def _read_json_lines(text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        try:
            yield Row(number, _fields(json.loads(line)))
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"not a JSON object: {error}")


def _fields(table: Any) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ValueError(f'{table!r} does not look like {{"prompt": "a red ball", "frames": 48}}')
    return {name: value for name, value in config.flatten(table).items() if value is not None}


def _read_csv(text: str) -> Iterator[Row]:
    """Read a table of a spreadsheet; empty rows and columns are skipped."""
    first, separator, _ = text.partition("\n")
    declared = re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE)  # a line that one program adds for itself
    skipped = len(first + separator) if declared else 0
    delimiter = declared[1] if declared else _delimiter(text)
    reader = csv.reader(io.StringIO(text[skipped:], newline=""), strict=True, delimiter=delimiter)
    before = 1 if declared else 0  # lines that the reader does not count
    header: list[str] = []
    begin = 1
    for row in reader:
        cells = [cell.strip() for cell in row]
        line, begin = before + begin, reader.line_num + 1  # of the file: a quoted cell may hold several lines
        if not any(cells):
            continue
        if not header:
            header = cells
            names = [name for name in header if name]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"two columns in line {line} have the same name, {twice!r}")
            continue
        header += [""] * (len(cells) - len(header))
        filled = [
            (number, name, cell) for number, (name, cell) in enumerate(zip(header, cells, strict=False), 1) if cell
        ]
        lost = [
            f"cell {number} is in a column without a name: {cell[:40]!r}" for number, name, cell in filled if not name
        ]
        yield Row(line, {name: cell for _, name, cell in filled if name}, "".join(lost[:1]))


def _delimiter(text: str) -> str:
    """Return the delimiter of the header: a comma, or a semicolon or tab if there is no comma."""
    first = next((line for line in text.splitlines() if line.strip(" ,;\t")), "")
    bare = re.sub(r'"[^"]*"', "", first)
    return next((mark for mark in ",;\t" if mark in bare), ",")


def _read_toml(text: str) -> Iterator[Row]:
    table = tomllib.loads(text.replace("\r\n", "\n"))
    rows = table.pop("jobs", [])
    if table or not isinstance(rows, list):
        raise ValueError(f"{next(iter(table), 'jobs')!r} is not known here: write each job as [[jobs]]")
    heads = [number for number, line in _lines(text) if re.match(r"\[\[\s*jobs\s*\]\]", line)]
    numbers = heads if len(heads) == len(rows) else range(1, len(rows) + 1)  # the parser gives no line numbers
    return (Row(number, _fields(row)) for number, row in zip(numbers, rows, strict=True))


_READERS: Mapping[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".toml": _read_toml,
    ".csv": _read_csv,
    ".txt": _read_text,
}
