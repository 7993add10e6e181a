"""A file as people export it -> text -> table -> checked rows.

What can be mended safely is mended, counted and said in one line a kind; the rest is refused by row number and id.
No message holds a text of the file.
"""

import codecs
import csv
import functools
import hashlib
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft_common import InputError, log, safe_id, some

REQUIRED_COLUMNS = ("id", "clinical_note", "model_summary", "label")
COLUMNS = (*REQUIRED_COLUMNS, "hallucination_type")
LABELS = ("factual", "hallucinated")


# ------------------------------------------------------------------------------------------------ text

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c]")  # a form feed parts words too
_SURROGATES = re.compile(r"[\ud800-\udfff]")  # half characters, which JSON can hold and UTF-8 cannot
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_OTHER_FORMATS = (
    (b"PK\x03\x04", "an Excel workbook (or another zip file)", "save it as 'CSV UTF-8'"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "save it as 'CSV UTF-8'"),
    (b"\x1f\x8b", "a gzip file", "unpack it"),
)
# Letters of DOS and Macintosh code pages lie where Windows-1252 keeps punctuation; a long run of letters beyond ASCII is another script
_NOT_WINDOWS_1252 = re.compile(rb"[A-Za-z][\x80-\x8b\x8d-\x91\x93-\x95\x98-\x9b\x9d-\x9f][A-Za-z]|[\xc0-\xff]{3}")


def clean_text(text: str) -> str:
    """Text as the model reads it: line ends are \\n, no control characters, no white space at the ends."""
    if not text.isascii():
        text = _SURROGATES.sub("\ufffd", text)
    return _CONTROL_CHARACTERS.sub("", _LINE_ENDS.sub("\n", text)).strip()


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: white space, zero-width and control characters alone."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def read_bytes(path: Path) -> bytes:
    """Raises InputError where there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}", "check the path")
    return path.read_bytes()


def decode_text(path: Path) -> str:
    """A file's text. Raises InputError where there is no such file or it is not text."""
    return decode_bytes(read_bytes(path), str(path))


def decode_bytes(data: bytes, name: str) -> str:
    mended = Counter()
    text = data.decode(find_encoding(data, name, mended))
    tell_mended(name, mended)
    return text


def find_encoding(data: bytes, name: str, mended: Counter) -> str:
    """The codec that decodes `data` whole: UTF-8, UTF-16 or UTF-32, or Windows-1252 where nothing speaks against it.

    Raises InputError where the bytes are not text.
    """
    for start, what, mend in _OTHER_FORMATS:
        if data.startswith(start):
            raise InputError(f"{name}: {what}, not a text file", mend)
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), None) or _utf_16_without_mark(data)
    try:
        pieces = (data[i : i + (1 << 20)] for i in range(0, len(data), 1 << 20))  # never the whole text in memory
        for _ in codecs.iterdecode(pieces, encoding or "utf-8"):
            pass
    except UnicodeDecodeError:
        if encoding is None and (n := _windows_1252_characters(data)):
            mended["read as Windows-1252 ({} characters that are not UTF-8)"] += n
            return "windows-1252"
        _refuse_encoding(data, encoding or "utf-8", name)
    if encoding not in (None, "utf-8-sig"):
        mended[f"read as {encoding[:6].upper()} ({{}} bytes)"] += len(data)
    return encoding or "utf-8"


def _utf_16_without_mark(data: bytes) -> str | None:
    """The codec of a file that begins with 8 or more ASCII characters in UTF-16: every other byte is NUL."""
    even, odd = data[:64:2], data[1:64:2]
    if len(odd) < 8:
        return None
    if not any(odd) and all(even):
        return "utf-16-le"
    return "utf-16-be" if not any(even) and all(odd) else None


def _windows_1252_characters(data: bytes) -> int:
    """How many characters beyond ASCII there are; 0 where it may be another encoding, or UTF-8 with a damaged spot."""
    beyond = len(data) - len(data.translate(None, bytes(range(128, 256))))
    controls = re.search(rb"[\x00-\x08\x0e-\x1f\x7f\x81\x8d\x8f\x90\x9d]", data)
    partly_utf_8 = re.search("[^\x00-\x7f\udc80-\udcff]", data.decode("utf-8", "surrogateescape"))
    return 0 if controls or partly_utf_8 or _NOT_WINDOWS_1252.search(data) or beyond * 5 > len(data) else beyond


def _refuse_encoding(data: bytes, encoding: str, name: str) -> None:
    if b"\0" in data and encoding == "utf-8":
        raise InputError(f"{name}: a binary file, not text", "save it as 'CSV UTF-8', or as a text file")
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name}: not {encoding.upper().removesuffix('-SIG')}: byte 0x{data[error.start]:02x} on line {line:,}",
            "save it as UTF-8 (in Excel: 'CSV UTF-8')",
        ) from None


def tell_mended(name: str | Path, mended: Counter) -> None:
    """One warning a kind, with its count in the place of {}; of several processes the first one speaks."""
    if os.environ.get("RANK", "0") == "0":
        for kind, count in mended.items():
            log(f"warning: {name}: {kind.format(f'{count:,}')}")


# ------------------------------------------------------------------------------------------------ table


def _lines(data: bytes, encoding: str, mended: Counter) -> Iterator[str]:
    for line in io.TextIOWrapper(io.BytesIO(data), encoding, newline=""):
        if _CONTROL_CHARACTERS.search(line):
            line, n = _CONTROL_CHARACTERS.subn("", line)
            mended["{} control characters (NUL and the like) dropped"] += n
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


def read_table(path: str | Path, required: Sequence[str], mended: Counter | None = None) -> Iterator[tuple[int, dict[str, str], bool]]:
    """Yields (row number, fields by column, whether there are more fields than columns) of a CSV's rows. Values are text
    as they stand: "NA" is sodium, not a missing value.

    `mended` counts what was mended; without it, that is said at the end of the file. Raises InputError where the file
    cannot be read as a CSV with the `required` columns.
    """
    counts = Counter() if mended is None else mended
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
    if mended is None:
        tell_mended(path, counts)


def _check_header(path: str | Path, header: list[str], required: Sequence[str]) -> None:
    missing = [name for name in required if name not in header]
    if missing:  # other columns are not named: where there is no header they are patients' text
        known = [name for name in COLUMNS if name in header]
        raise InputError(
            f"{path}: no column {some(missing)} in the header ({len(header)} columns, of which {some(known) or 'none'} {'is' if len(known) == 1 else 'are'} known)",
            f"name the columns {','.join(COLUMNS)}, separated by commas, semicolons or tabs",
        )
    repeated = [name for name in COLUMNS if header.count(name) > 1]
    if repeated:
        raise InputError(f"{path}: column {some(repeated)} stands twice in the header", "keep one of each")


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
    rows, problems, n_problems, mended = [], [], 0, Counter()
    for row_number, fields, too_many in read_table(path, REQUIRED_COLUMNS, mended):
        label = fields.get("label", "")
        row = Row(
            row_number,
            fields.get("id", "").strip(),
            clean_text(fields.get("clinical_note", "")),
            clean_text(fields.get("model_summary", "")),
            label if label in LABELS else _SPELLINGS.get(_plain(label), ""),
            fields.get("hallucination_type", "").strip(),
        )
        mended[f"{{}} labels spelled otherwise, read as {' or '.join(LABELS)}"] += row.label not in ("", label)
        rows.append(row)
        for problem in _problems(row, too_many):
            n_problems += 1
            if n_problems <= 5:
                problems.append(f"row {row.number} (id {'empty' if is_blank(row.id) else safe_id(row.id)}): {problem}")
    if problems:
        what = "1 problem" if n_problems == 1 else f"{n_problems:,} problems"
        more = f"; and {n_problems - 5:,} more" if n_problems > 5 else ""
        raise InputError(f"{path}: {what}: " + "; ".join(problems) + more, "mend or delete these rows")
    if not rows:
        raise InputError(f"{path}: no rows below the header", "add rows, at least one of them labelled factual")
    tell_mended(path, +mended)  # + leaves out what is 0
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
            f"{path}: no row is labelled factual ({len(rows):,} rows)", "Stage A trains on factual rows only: label them 'factual'"
        )
    return factual


def same_text_key(text: str) -> bytes:
    """Equal for two texts that differ in case and white space alone (a digest, since a set of texts is as large as the file)."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


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
