"""A CSV file as people export it -> table -> checked rows.

What can be repaired safely is repaired, counted and reported once per kind; the rest is refused by row number
and id. No message holds text of the file.
"""

import csv
import functools
import hashlib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sft.cli import InputError, plural, preview_list, safe_id
from sft.data.text import (
    CONTROL_CHARACTERS,
    Repair,
    clean_text,
    find_encoding,
    is_blank,
    log_repairs,
    read_bytes,
)

REQUIRED_COLUMNS = ("id", "clinical_note", "model_summary", "label")
COLUMNS = (*REQUIRED_COLUMNS, "hallucination_type")
LABELS = ("factual", "hallucinated")

_CONTROL_CHARACTER = Repair("control character", "(NUL and the like) dropped")
_BLANK_ROW = Repair("blank row", "skipped")
_HEADER_ROW = Repair("repeated header row", "skipped")
_LABEL_SPELLING = Repair("label", f"in a different spelling, read as {' or '.join(LABELS)}")


# ------------------------------------------------------------------------------- table


class _Header(NamedTuple):
    delimiter: str
    fields: list[str]
    row_number: int

    @property
    def columns(self) -> list[str]:
        return [re.sub(r"[\s-]+", "_", _plain(field)) for field in self.fields]


def read_table(
    path: str | Path, required: Sequence[str], repairs: Counter | None = None
) -> Iterator[tuple[int, dict[str, str], bool]]:
    """Yields (row number, fields by column, whether there are more fields than columns) for each row.

    Values are unchanged text: "NA" is sodium, not a missing value. Repairs are counted in `repairs`, or
    logged at the end of the file if it is None. Raises InputError if the file cannot be read as a CSV with
    the `required` columns.
    """
    counts = Counter() if repairs is None else repairs
    data = read_bytes(Path(path))
    if not data.strip(b"\0 \t\r\n"):
        raise InputError(f"{path}: the file is empty", f"add a header row: {_header_of(required)}")
    encoding = find_encoding(data, str(path), counts)
    # A note may be longer than the csv module's 128 KiB
    csv.field_size_limit(1 << 30)
    header = _find_header(data, encoding)
    columns = header.columns
    _check_columns(path, columns, required)
    reader = csv.reader(_lines(data, encoding, counts), delimiter=header.delimiter, strict=True)
    row_number = 0
    line_number = 0
    try:
        for row_number, fields in enumerate(reader, 1):
            line_number = reader.line_num
            if row_number <= header.row_number:
                continue
            if not any(field.strip() for field in fields):
                counts[_BLANK_ROW] += 1
            # As in files that were concatenated
            elif [field.lstrip("\ufeff") for field in fields] == header.fields:
                counts[_HEADER_ROW] += 1
            else:
                has_more = any(field.strip() for field in fields[len(columns) :])
                yield row_number, dict(zip(columns, fields)), has_more
    except csv.Error as error:
        place = f"row {row_number + 1:,}, which begins on line {line_number + 1:,}"
        fix = "double every quote inside a cell, and quote the cell itself"
        raise InputError(f"{path}: {place}: unbalanced quotes ({error})", fix) from None
    if repairs is None:
        log_repairs(path, counts)


def _lines(data: bytes, encoding: str, repairs: Counter) -> Iterator[str]:
    for line in io.TextIOWrapper(io.BytesIO(data), encoding, newline=""):
        if CONTROL_CHARACTERS.search(line):
            line, n = CONTROL_CHARACTERS.subn("", line)
            repairs[_CONTROL_CHARACTER] += n
        yield line


def _find_header(data: bytes, encoding: str) -> _Header:
    """The first row that is neither blank nor Excel's "sep=;", with the delimiter that gives it the most
    known columns."""
    candidates = []
    for delimiter in ",;\t":
        reader = csv.reader(_lines(data, encoding, Counter()), delimiter=delimiter)
        for row_number, fields in enumerate(reader, 1):
            is_excels = "".join(fields).strip(",;\t").lower() == "sep="
            if any(field.strip() for field in fields) and not is_excels:
                candidates.append(_Header(delimiter, fields, row_number))
                break
    nothing = _Header(",", [], 0)
    return max(candidates, key=lambda header: len(set(header.columns) & set(COLUMNS)), default=nothing)


def _check_columns(path: str | Path, columns: list[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in columns]
    if missing:
        # Unknown columns are not named: in a file without a header they are patients' text
        known = preview_list(name for name in COLUMNS if name in columns) or "none"
        found = f"{plural(len(columns), 'column')}, known: {known}"
        problem = f"{path}: no column {preview_list(missing)} in the header ({found})"
        fix = f"the header row must name {_header_of(required)}; separate columns with commas, semicolons or tabs"
        raise InputError(problem, fix)
    repeated = [name for name in COLUMNS if columns.count(name) > 1]
    if repeated:
        words = ("column", "appears") if len(repeated) == 1 else ("columns", "appear")
        problem = f"{words[0]} {preview_list(repeated)} {words[1]} more than once in the header"
        raise InputError(f"{path}: {problem}", "keep one of each")


def _header_of(required: Sequence[str]) -> str:
    """The columns of a header, for people."""
    optional = "hallucination_type" if "id" in required else "id"
    return f"{', '.join(required)} ({optional} is optional)"


def _plain(name: str) -> str:
    """A column's name or a label in lower case, without white space at the ends and invisible characters."""
    return "".join(c for c in name if unicodedata.category(c) != "Cf").strip().lower()


# ------------------------------------------------------------------------------- rows

_SPELLINGS = {"factual": "factual", "hallucinated": "hallucinated", "hallucination": "hallucinated"}
_WHOLE_ROW = re.compile(rf"""[,;\t]"?({"|".join(LABELS)})"?([,;\t]|$)""", re.IGNORECASE | re.MULTILINE)
_MOST_PROBLEMS = 5  # in one message


@dataclass(frozen=True)
class Row:
    number: int  # as a spreadsheet counts: the header is row 1
    id: str
    clinical_note: str
    model_summary: str
    label: str  # one of LABELS
    hallucination_type: str = ""

    @functools.cached_property
    def note_key(self) -> bytes:
        return _same_text_key(self.clinical_note)

    @functools.cached_property
    def summary_key(self) -> bytes:
        return _same_text_key(self.model_summary)


def _same_text_key(text: str) -> bytes:
    """Equal for texts that differ in case and white space alone. A digest, since it takes less memory."""
    words = " ".join(text.casefold().split())
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a CSV, checked. Raises InputError with the bad rows' numbers and ids."""
    rows = []
    problems = []
    repairs = Counter()
    for row_number, fields, has_more in read_table(path, REQUIRED_COLUMNS, repairs):
        row = _make_row(row_number, fields)
        rows.append(row)
        if row.label not in ("", fields.get("label")):
            repairs[_LABEL_SPELLING] += 1
        shown_id = "empty" if is_blank(row.id) else safe_id(row.id)
        problems += (f"row {row_number} (id {shown_id}): {problem}" for problem in _problems(row, has_more))
    if problems:
        n_more = len(problems) - _MOST_PROBLEMS
        more = f"; and {n_more:,} more" if n_more > 0 else ""
        shown = "; ".join(problems[:_MOST_PROBLEMS]) + more
        raise InputError(f"{path}: {plural(len(problems), 'problem')}: {shown}", "fix or delete these rows")
    if not rows:
        raise InputError(
            f"{path}: no rows below the header", "add rows, at least one of them labeled factual"
        )
    log_repairs(path, repairs)
    return rows


def _make_row(row_number: int, fields: dict[str, str]) -> Row:
    label = fields.get("label", "")
    return Row(
        number=row_number,
        id=fields.get("id", "").strip(),
        clinical_note=clean_text(fields.get("clinical_note", "")),
        model_summary=clean_text(fields.get("model_summary", "")),
        label=label if label in LABELS else _SPELLINGS.get(_plain(label), ""),
        hallucination_type=fields.get("hallucination_type", "").strip(),
    )


def _problems(row: Row, has_more_fields: bool) -> Iterator[str]:
    if has_more_fields:
        yield "more fields than the header has columns (a comma outside quotes?)"
    if is_blank(row.id):
        yield "id is empty"
    for name in ("clinical_note", "model_summary"):
        text = getattr(row, name)
        if is_blank(text):
            yield f"{name} is empty"
        elif "\n" in text and _WHOLE_ROW.search(text):
            yield f"{name} contains other rows (an unclosed quote?)"
    if not row.label:
        yield f"label is neither {' nor '.join(LABELS)} (a comma outside quotes?)"


# ------------------------------------------------------------------------------- sets of rows


def factual_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows that Stage A trains on."""
    return [row for row in rows if row.label == "factual"]


def leaked_rows(train: Iterable[Row], validation: Iterable[Row]) -> list[Row]:
    """The validation rows whose note is in the training rows too."""
    known = {row.note_key for row in train}
    return [row for row in validation if row.note_key in known]


def repeated_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows that repeat an earlier row's id, or its note together with its summary."""
    ids = set()
    texts = set()
    repeated = []
    for row in rows:
        text = (row.note_key, row.summary_key)
        if row.id in ids or text in texts:
            repeated.append(row)
        ids.add(row.id)
        texts.add(text)
    return repeated
