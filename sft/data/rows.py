"""A file as people export it -> text -> table -> checked rows.

What can be repaired safely is repaired, counted and said in one line a kind; the rest is refused by row number and id.
No message holds a text of the file.
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

from sft.cli import InputError, preview_list, safe_id
from sft.data.text import _CONTROL_CHARACTERS, clean_text, find_encoding, is_blank, log_repairs, read_bytes

REQUIRED_COLUMNS = ("id", "clinical_note", "model_summary", "label")
COLUMNS = (*REQUIRED_COLUMNS, "hallucination_type")
LABELS = ("factual", "hallucinated")


# ------------------------------------------------------------------------------------------------ text


# ------------------------------------------------------------------------------------------------ table


def _lines(data: bytes, encoding: str, repairs: Counter) -> Iterator[str]:
    for line in io.TextIOWrapper(io.BytesIO(data), encoding, newline=""):
        if _CONTROL_CHARACTERS.search(line):
            line, n = _CONTROL_CHARACTERS.subn("", line)
            repairs["{} control characters (NUL and the like) dropped"] += n
        yield line


def _plain(name: str) -> str:
    """A column's name or a label without case, white space at the ends, and characters that do not show."""
    return "".join(c for c in name if unicodedata.category(c) != "Cf").strip().lower()


def _column_names(fields: list[str]) -> list[str]:
    return [re.sub(r"[\s-]+", "_", _plain(field)) for field in fields]


def _find_header(data: bytes, encoding: str) -> tuple[str, list[str], int]:
    """(delimiter, fields, row number) of the header: the first row that is neither blank nor Excel's "sep=;"."""
    found = []
    for delimiter in ",;\t":
        for row, fields in enumerate(csv.reader(_lines(data, encoding, Counter()), delimiter=delimiter), 1):
            if any(field.strip() for field in fields) and "".join(fields).strip(",;\t").lower() != "sep=":
                found.append((delimiter, fields, row))
                break
    return max(found, key=lambda one: len(set(_column_names(one[1])) & set(COLUMNS)), default=(",", [], 0))


def read_table(
    path: str | Path, required: Sequence[str], repairs: Counter | None = None
) -> Iterator[tuple[int, dict[str, str], bool]]:
    """Yields (row number, fields by column, whether there are more fields than columns) of a CSV's rows. Values are text
    as they stand: "NA" is sodium, not a missing value.

    `repairs` counts what was repaired; without it, that is said at the end of the file. Raises InputError where the file
    cannot be read as a CSV with the `required` columns.
    """
    counts = Counter() if repairs is None else repairs
    data = read_bytes(Path(path))
    if not data.strip(b"\0 \t\r\n"):
        raise InputError(f"{path}: the file is empty", f"its first row names the columns {','.join(COLUMNS)}")
    encoding = find_encoding(data, str(path), counts)
    csv.field_size_limit(1 << 30)  # a note may be longer than the csv module's 128 KiB
    delimiter, header_fields, header_row = _find_header(data, encoding)
    header = _column_names(header_fields)
    _check_header(path, header, required)
    reader = csv.reader(_lines(data, encoding, counts), delimiter=delimiter, strict=True)
    row = line = 0
    try:
        for row, fields in enumerate(reader, 1):
            line = reader.line_num
            if row <= header_row:
                continue
            if not any(field.strip() for field in fields):
                counts["{} blank rows skipped"] += 1
            elif [field.lstrip("\ufeff") for field in fields] == header_fields:
                counts["{} repeated header rows skipped"] += 1  # of files put together
            else:
                yield row, dict(zip(header, fields)), any(field.strip() for field in fields[len(header) :])
    except csv.Error as error:
        raise InputError(
            f"{path}: row {row + 1:,}, which begins on line {line + 1:,}: unbalanced quotes ({error})",
            "a quote inside a cell is doubled, the cell itself quoted",
        ) from None
    if repairs is None:
        log_repairs(path, counts)


def _check_header(path: str | Path, header: list[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in header]
    if missing:  # other columns are not named: where there is no header they are patients' text
        known = [name for name in COLUMNS if name in header]
        raise InputError(
            f"{path}: no column {preview_list(missing)} in the header ({len(header)} columns, of which {preview_list(known) or 'none'} {'is' if len(known) == 1 else 'are'} known)",
            f"name the columns {','.join(COLUMNS)}, separated by commas, semicolons or tabs",
        )
    repeated = [name for name in COLUMNS if header.count(name) > 1]
    if repeated:
        raise InputError(
            f"{path}: column {preview_list(repeated)} stands twice in the header", "keep one of each"
        )


# ------------------------------------------------------------------------------------------------ rows

_SPELLINGS = {"factual": "factual", "hallucinated": "hallucinated", "hallucination": "hallucinated"}
_WHOLE_ROW = re.compile(rf"""[,;\t]"?({"|".join(LABELS)})"?([,;\t]|$)""", re.IGNORECASE | re.MULTILINE)


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
        return same_text_key(self.clinical_note)

    @functools.cached_property
    def summary_key(self) -> bytes:
        return same_text_key(self.model_summary)


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a CSV in the toolkit's form, checked. Raises InputError naming the bad rows (by number and id, never text)."""
    rows, problems, n_problems, repairs = [], [], 0, Counter()
    for row_number, fields, too_many in read_table(path, REQUIRED_COLUMNS, repairs):
        label = fields.get("label", "")
        row = Row(
            row_number,
            fields.get("id", "").strip(),
            clean_text(fields.get("clinical_note", "")),
            clean_text(fields.get("model_summary", "")),
            label if label in LABELS else _SPELLINGS.get(_plain(label), ""),
            fields.get("hallucination_type", "").strip(),
        )
        repairs[f"{{}} labels spelled otherwise, read as {' or '.join(LABELS)}"] += row.label not in (
            "",
            label,
        )
        rows.append(row)
        for problem in _problems(row, too_many):
            n_problems += 1
            if n_problems <= 5:
                problems.append(
                    f"row {row.number} (id {'empty' if is_blank(row.id) else safe_id(row.id)}): {problem}"
                )
    if problems:
        what = "1 problem" if n_problems == 1 else f"{n_problems:,} problems"
        more = f"; and {n_problems - 5:,} more" if n_problems > 5 else ""
        raise InputError(f"{path}: {what}: " + "; ".join(problems) + more, "fix or delete these rows")
    if not rows:
        raise InputError(
            f"{path}: no rows below the header", "add rows, at least one of them labelled factual"
        )
    log_repairs(path, +repairs)  # + leaves out what is 0
    return rows


def _problems(row: Row, too_many_fields: bool) -> Iterator[str]:
    if too_many_fields:
        yield "more fields than the header has columns (a comma outside quotes?)"
    if is_blank(row.id):
        yield "id is empty"
    for name in ("clinical_note", "model_summary"):
        text = getattr(row, name)
        if is_blank(text):
            yield f"{name} is empty"
        elif "\n" in text and _WHOLE_ROW.search(text):
            yield f"{name} holds other rows (a quote that is not closed?)"
    if not row.label:
        yield f"label is neither {' nor '.join(LABELS)} (or a comma outside quotes shifts the columns)"


def factual_rows(rows: Sequence[Row], path: str | Path) -> list[Row]:
    """The rows Stage A trains on. Raises InputError if there are none."""
    factual = [row for row in rows if row.label == "factual"]
    if not factual:
        raise InputError(
            f"{path}: no row is labelled factual ({len(rows):,} rows)",
            "Stage A trains on factual rows only: label them 'factual'",
        )
    return factual


def same_text_key(text: str) -> bytes:
    """Equal for two texts that differ in case and white space alone (a digest, since a set of texts is as large as the file)."""
    return hashlib.blake2b(
        " ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()


def leaked_rows(train: Iterable[Row], validation: Iterable[Row]) -> list[Row]:
    """The validation rows whose note stands in the training rows too."""
    known = {row.note_key for row in train}
    return [row for row in validation if row.note_key in known]


def repeated_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows that repeat an earlier row's id, or its note together with its summary."""
    ids, texts, repeated = set(), set(), []
    for row in rows:
        text = (row.note_key, row.summary_key)
        if row.id in ids or text in texts:
            repeated.append(row)
        ids.add(row.id)
        texts.add(text)
    return repeated
