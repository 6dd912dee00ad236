"""A file of jobs as rows: JSON lines, TOML, CSV, or a prompt a line."""

from __future__ import annotations

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
    """One job as it was written: where it stands, and what is wrong with the line itself, if anything is."""

    line: int
    fields: dict[str, Any]
    error: str = ""


def read(place: str) -> list[Row]:
    """Read the rows of a file of jobs, or of standard input ("-": JSON lines, or a prompt a line).

    Raises:
        InputError: it cannot be read. ConfigError: no such kind of file, not whole as such, or without a job.
    """
    try:
        data = sys.stdin.buffer.read() if place == "-" else Path(place).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the jobs in {place}: {error.strerror or error}") from error
    # Bytes that are no text are kept as they are, for the check of the row that holds them.
    text = data.decode("utf-8-sig", errors="surrogateescape")
    kind = Path(place).suffix.lower() if place != "-" else ".jsonl" if text.lstrip().startswith("{") else ".txt"
    if kind not in _READERS:
        raise ConfigError(f"{place} is no file of jobs", f"known: {', '.join(_READERS)}, or - for standard input")
    try:
        rows = list(_READERS[kind](text))
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{place} cannot be read as {kind[1:]}: {error}") from error
    if not rows:
        raise ConfigError(
            f"{place if place != '-' else 'standard input'} holds no jobs",
            "write a prompt a line, or rows as `streamt2v batch --help` shows",
        )
    return rows


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _read_text(text: str) -> Iterator[Row]:
    return (Row(number, {"prompt": line}) for number, line in _lines(text))


def _read_json_lines(text: str) -> Iterator[Row]:
    for number, line in _lines(text):
        try:
            yield Row(number, _fields(json.loads(line)))
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"no JSON object: {error}")


def _fields(table: Any) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise ValueError(f'{table!r} is not like {{"prompt": "a red ball", "frames": 48}}')
    return {name: value for name, value in config.flatten(table).items() if value is not None}


def _read_csv(text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = [name.strip() for name in next(reader, [])]
    if len(set(header)) < len(header):
        raise ValueError("two columns have the same name")
    begin = reader.line_num + 1
    for cells in reader:
        surplus = f"{len(cells)} cells, the header names {len(header)}" if len(cells) > len(header) else ""
        if any(cells):
            yield Row(begin, {name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()}, surplus)
        begin = reader.line_num + 1  # of the file: a quoted cell may hold several lines


def _read_toml(text: str) -> Iterator[Row]:
    table = tomllib.loads(text.replace("\r\n", "\n"))
    rows = table.pop("jobs", [])
    if table or not isinstance(rows, list):
        raise ValueError(f"{next(iter(table), 'jobs')!r} is not known here: write every job as [[jobs]]")
    heads = [number for number, line in _lines(text) if re.match(r"\[\[\s*jobs\s*\]\]", line)]
    numbers = heads if len(heads) == len(rows) else range(1, len(rows) + 1)  # the parser tells no line
    return (Row(number, _fields(row)) for number, row in zip(numbers, rows, strict=True))


_READERS: Mapping[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": _read_json_lines, ".toml": _read_toml, ".csv": _read_csv, ".txt": _read_text
}  # fmt: skip
