"""A file as people export it (.csv, .tsv, .json, .jsonl) or a pandas DataFrame -> rows of text cells.

Every cell is the text that stands in the file: "NA" is sodium, an id 3.0 of JSON is "3", null is an empty
cell. pandas' own readers would lose that (ids become floats, "NA" is missing) and what is repaired here, so
the csv and json modules read, and pandas makes a table of JSON of either orientation. No message holds text
of a file."""

import csv
import io
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.cli import InputError, plural, preview_list, safe_id
from sft.data.formats import kind_of_file
from sft.data.shifted import PART_OF_A_ROW, RowCheck
from sft.data.text import (
    CONTROL_CHARACTERS,
    SURROGATES,
    decode_bytes,
    find_encoding,
    log_repairs,
    read_bytes,
)

if TYPE_CHECKING:
    import pandas as pd

REQUIRED_COLUMNS = ("clinical_note", "model_summary", "label")
COLUMNS = ("id", *REQUIRED_COLUMNS, "hallucination_type")
OPTION_OF_COLUMN = {
    "id": "--id_column",
    "clinical_note": "--note_column",
    "model_summary": "--summary_column",
    "label": "--label_column",
}
# What other data sets call them
OTHER_NAMES = {
    "id": "note_id row_id hadm_id patient_id subject_id encounter_id idx".split(),
    "clinical_note": "note text input inputs transcription dialogue document report article source".split(),
    "model_summary": "summary output outputs target response completion answer highlights description".split(),
    "label": "is_factual factuality verdict class".split(),
}
_KNOWN = {*COLUMNS, *itertools.chain(*OTHER_NAMES.values())}

csv.field_size_limit(1 << 30)  # a note may be longer than the 128 KiB that the csv module takes
_START = 100_000  # characters of a file that tell its format
_MOST_NAMES = 12  # of columns that are shown
_LONGEST_NAME = 30  # characters
_NAME = re.compile(r"[^\W\d_][^\W_]*([_.][^\W_]+){0,3}")  # at most four words


def read_table(
    source: "str | Path | pd.DataFrame",
    required: Sequence[str],
    repairs: Counter | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> Iterator[tuple[int, dict[str, str], str]]:
    """Yields (row number, cells by column, "" or why the cells cannot be its own) for each row.

    The row number is that of a spreadsheet, a line of .jsonl, or a record of .json and a DataFrame (from 1).
    `columns` says what the file calls a column of ours: {"clinical_note": "TEXT"}. Repairs are counted in
    `repairs`, or logged at the end of the file if it is None. Raises InputError if the source cannot be read
    as a table with the `required` columns."""
    counts = Counter() if repairs is None else repairs
    names = names_of_columns(columns or {})
    if not isinstance(source, str | Path):
        yield from _records(source_name(source), source, itertools.count(1), required, names)
    elif Path(source).suffix.lower() in (".json", ".jsonl"):
        numbers, frame = _read_json(Path(source), required)
        yield from _records(str(source), frame, numbers, required, names)
    else:
        yield from _read_csv(Path(source), required, counts, names)
    if repairs is None:
        log_repairs(str(source), counts)


def separator_of(path: Path, columns: Mapping[str, str | None]) -> str:
    """What stands between the cells of a .csv or .tsv; `columns` as for read_table."""
    data = read_bytes(path)
    encoding = find_encoding(data, str(path), Counter())
    return _find_header(data, encoding, names_of_columns(columns), path.suffix.lower() == ".tsv")[0]


def names_of_columns(columns: Mapping[str, str | None]) -> dict[str, str]:
    """{"text": "clinical_note"} of {"clinical_note": "TEXT"}. Raises InputError for two of one column."""
    names = {}
    for ours, theirs in columns.items():
        if theirs and names.setdefault(column_name(theirs), ours) != ours:
            both = f"{OPTION_OF_COLUMN[names[column_name(theirs)]]} and {OPTION_OF_COLUMN[ours]}"
            raise InputError(f"{both} name the same column", "name another column with one of them")
    return names


def source_name(source: "str | Path | pd.DataFrame") -> str:
    """What messages call a table."""
    return str(source) if isinstance(source, str | Path) else "the DataFrame"


def column_name(name: str) -> str:
    """ " Clinical-Note" -> "clinical_note"."""
    return re.sub(r"[\s-]+", "_", plain(name))


def plain(name: str) -> str:
    """A column's name or a label in lower case, without white space at the ends and invisible characters."""
    return "".join(c for c in name if unicodedata.category(c) != "Cf").strip().lower()


# ------------------------------------------------------------------------------- CSV


def _read_csv(
    path: Path, required: Sequence[str], counts: Counter, names: Mapping[str, str]
) -> Iterator[tuple[int, dict[str, str], str]]:
    data = read_bytes(path)
    if not data.strip(b"\0 \t\r\n"):
        raise InputError(f"{path}: the file is empty", f"add a header row: {_header_of(required)}")
    encoding = find_encoding(data, str(path), counts)
    delimiter, header_row, header, first_row = _find_header(
        data, encoding, names, path.suffix.lower() == ".tsv"
    )
    kind = kind_of_file(data[:_START].decode(encoding, "ignore"))
    columns = _checked_columns(path, header, first_row, required, names, kind)
    reader = csv.reader(_lines(data, encoding, counts), delimiter=delimiter, strict=True)
    line_end = re.search(r"[\r\n]*$", next(_lines(data, encoding, Counter())))[0]
    needed = [columns.index(name) for name in required]
    check = RowCheck(header, delimiter, line_end or "\n", needed)
    row_names = []
    last_cell = ""
    row_number = 0
    line_number = 0
    try:
        for row_number, fields in enumerate(reader, 1):
            line_number = reader.line_num
            if row_number <= header_row:
                continue
            if not any(field.strip() for field in fields):
                counts["blank row", "skipped"] += 1
            elif _is_header(fields, header, needed, f"{path}: row {row_number:,}"):
                counts["repeated header row", "skipped"] += 1
            else:
                is_number = len(fields) == len(header) + 1 and re.fullmatch(r"\d{1,9}", fields[0])
                row_names.append(int(fields[0]) if is_number else -1)
                last_cell = fields[-1]
                problem = check.problem(fields)
                cells = dict.fromkeys(columns, "") | dict(zip(columns, fields))
                # It has words of a note in the place of the id, which messages show
                if problem == PART_OF_A_ROW and "id" in cells:
                    cells["id"] = ""
                yield row_number, cells, problem
    except csv.Error as error:
        place = f"row {row_number + 1:,}, which begins on line {line_number + 1:,}"
        fix = "double every quote inside a cell, and quote the cell itself"
        raise InputError(f"{path}: {place}: unbalanced quotes ({error})", fix) from None
    # A comma outside quotes in the only row is another fault
    is_alone = len(row_names) == 1 and last_cell.strip()
    if row_names and -1 not in row_names and row_names == sorted(set(row_names)) and not is_alone:
        problem = f"{path}: every row has a cell more than the header, and begins with a number (row names?)"
        fix = "write no row names (R: row.names=FALSE), or a separator at the header's end too"
        raise InputError(problem, fix)


def _is_header(fields: Sequence[str], header: Sequence[str], needed: Sequence[int], place: str) -> bool:
    """Whether a row repeats the header, as in files that were concatenated. `needed`: where the header has
    the columns that are used. Raises InputError for another header."""
    names, known = ([cell.strip('\ufeff" ').lower() for cell in cells] for cells in (fields, header))
    has_needed = {known[i] for i in needed} <= set(names)
    in_place = any(known[i] in names[i : i + 1] for i in needed)
    if names != known and has_needed and (in_place or len(set(names) & set(known)) > 1):
        raise InputError(f"{place}: a second header, unlike the first", "pass it as a file of its own")
    return names == known


def _lines(data: bytes, encoding: str, counts: Counter) -> Iterator[str]:
    for line in io.TextIOWrapper(io.BytesIO(data), encoding, newline=""):
        if CONTROL_CHARACTERS.search(line):
            line, n = CONTROL_CHARACTERS.subn("", line)
            counts["control character", "(NUL and the like) dropped"] += n
        yield line


def _find_header(
    data: bytes, encoding: str, names: Mapping[str, str], has_tabs: bool
) -> tuple[str, int, list[str], list[str]]:
    """(delimiter, row number, fields, the next row's fields) of the first row that is neither blank nor
    Excel's "sep=;".

    The delimiter is the one that gives it the most known columns; if all are unknown, a tab if `has_tabs`,
    else that of the most columns, preferably as many as in the next row."""

    def candidate(delimiter: str) -> tuple[str, int, list[str], list[str]]:
        reader = csv.reader(_lines(data, encoding, Counter()), delimiter=delimiter)
        for row_number, fields in enumerate(reader, 1):
            is_excels = "".join(fields).strip(",;\t|").lower() == "sep="
            if any(field.strip() for field in fields) and not is_excels:
                return delimiter, row_number, fields, next(reader, [])
        return delimiter, 0, [], []

    def rank(header: tuple[str, int, list[str], list[str]]) -> tuple:
        delimiter, _, fields, next_fields = header
        n_known = len({column_name(field) for field in fields} & (_KNOWN | names.keys()))
        is_expected = has_tabs and delimiter == "\t" and len(fields) > 1
        return n_known, is_expected, 1 < len(fields) == len(next_fields), len(fields)

    # Of equals the first
    return max(map(candidate, "\t,;|" if has_tabs else ",;\t|"), key=rank)


# ------------------------------------------------------------------------------- JSON, DataFrame


def _read_json(path: Path, required: Sequence[str]) -> "tuple[Iterable[int], pd.DataFrame]":
    """(row numbers, table) of a list of objects, an object of columns, or an object per line."""
    import pandas as pd

    text = decode_bytes(read_bytes(path), str(path)).lstrip("\ufeff")
    if not text.strip():
        raise InputError(f"{path}: the file is empty", f"write objects with the keys {_header_of(required)}")
    place = "not a JSON table"
    try:
        try:
            records = _parse_json(text)
            numbers = None
        except json.JSONDecodeError as error:
            is_lines = error.msg == "Extra data" or (
                path.suffix.lower() == ".jsonl" and text.lstrip()[0] != "["
            )
            if not is_lines:
                place = f"not a JSON table: line {error.lineno:,}: {error.msg}"
                raise
            lines = {i: line for i, line in enumerate(io.StringIO(text, newline=None), 1) if line.strip()}
            numbers = list(lines)
            records = []
            for number, line in lines.items():
                place = f"line {number:,} is not a JSON object"
                records.append(_parse_json(line))
                if not isinstance(records[-1], dict):
                    raise ValueError from None
        # Columns: {"id": [...], ...}, or as pandas writes them, {"id": {"0": ...}, ...}
        is_columns = isinstance(records, dict) and all(isinstance(v, list | dict) for v in records.values())
        if not is_columns:
            records = records if isinstance(records, list) else [records]
            if not all(isinstance(record, dict) for record in records):
                raise ValueError
        frame = pd.DataFrame(records, dtype=object)
        numbers = numbers or range(1, len(frame) + 1)
    except (ValueError, RecursionError, AttributeError):
        fix = "write a list of objects, or one object per line; if it is a CSV, name it .csv"
        raise InputError(f"{path}: {place}", fix) from None
    for number, record in zip(numbers, [records] if is_columns else records):
        if isinstance(record, _Repeated):
            where = "the object" if is_columns else f"row {number:,}"
            raise InputError(f"{path}: {where} has the same key twice", "keep one of each")
    return numbers, frame


class _Repeated(dict):
    """A JSON object that has a key twice, or holds one."""


def _parse_json(text: str):
    """JSON whose numbers stay as they are written, except that 3.0 is 3: pandas writes ids like that."""

    def whole(number: str) -> str:
        return re.sub(r"\.0+$", "", number)

    def record(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        is_repeated = len(found) < len(pairs) or any(isinstance(v, _Repeated) for v in found.values())
        return _Repeated(found) if is_repeated else found

    how = {"parse_int": str, "parse_float": whole, "parse_constant": lambda _: None}
    return json.loads(text, object_pairs_hook=record, **how)


def _records(
    name: str,
    frame: "pd.DataFrame",
    numbers: Iterable[int],
    required: Sequence[str],
    names: Mapping[str, str],
) -> Iterator[tuple[int, dict[str, str], str]]:
    """The rows of a DataFrame as text; a list or an object in a column that is not ours as JSON."""
    columns = _checked_columns(
        name, list(map(str, frame.columns)), [*frame.head(1).to_numpy().flat], required, names
    )
    missing = frame.isna().to_numpy()
    for number, values, is_missing in zip(numbers, frame.itertuples(index=False, name=None), missing):
        cells = {}
        for column, value, is_none in zip(columns, values, is_missing):
            is_nested = isinstance(value, list | dict | set | tuple)
            if column in COLUMNS and (is_nested or (column == "id" and isinstance(value, bool))):
                what = "holds a list, an object or true/false, not text"
                raise InputError(f"{name}: row {number:,}: column {column} {what}", "make it one text")
            is_whole = isinstance(value, float) and value.is_integer()
            text = json.dumps(value, ensure_ascii=False, default=str) if is_nested else str(value)
            text = "" if is_none else str(int(value)) if is_whole else text
            cells[column] = SURROGATES.sub("\ufffd", text)
        yield number, cells, ""


# ------------------------------------------------------------------------------- columns


def _checked_columns(
    path: object,
    header: Sequence[str],
    first_row: Sequence,
    required: Sequence[str],
    names: Mapping[str, str],
    kind: str | None = None,
) -> list[str]:
    """The columns of a header under our names. A column that an option names takes the place of one that has
    our name. `first_row`: the values below. `kind`: what the file looks like, if not like a table."""
    columns = [column_name(field) for field in header]
    absent = [OPTION_OF_COLUMN.get(ours, ours) for theirs, ours in names.items() if theirs not in columns]
    if absent:
        raise InputError(f"{path}: no column is called what {preview_list(absent)} says", "check its name")
    taken = set(names.values())
    columns = [names.get(column) or (f"other_{column}" if column in taken else column) for column in columns]
    missing = [name for name in required if name not in columns]
    if missing and kind:
        fix = "save a table as .csv, .json or .jsonl (one object per line)"
        raise InputError(f"{path}: this is {kind}, not a CSV", fix)
    if missing:
        raise InputError(*_missing_columns(path, columns, first_row, missing, required))
    repeated = [name for name in COLUMNS if columns.count(name) > 1]
    if repeated:
        raise InputError(
            f"{path}: more than once in the header: {preview_list(repeated)}", "keep one of each"
        )
    # Of two others of one name nobody can mean one
    counts = Counter(columns)
    return [column if counts[column] == 1 else f"{column} (repeated)" for column in columns]


def _missing_columns(
    path: object, columns: Sequence[str], first_row: Sequence, missing: Sequence[str], required: Sequence[str]
) -> tuple[str, str]:
    """(problem, fix)."""
    nested = [name for name, value in zip(columns, first_row) if isinstance(value, list | dict)]
    if nested and (len(columns) == 1 or not {"messages", "conversations"}.isdisjoint(nested)):
        problem = f"{path}: the rows are under {safe_id(nested[0])}, not columns of text"
        return problem, f"write one object per row, with the texts {_header_of(required)}"
    options = []
    for ours in missing:
        name = next((name for name in OTHER_NAMES[ours] if name in columns), None)
        can_be_all = ours == "label" and name is None
        option = f"{OPTION_OF_COLUMN[ours]} {name or 'NAME'}"
        options.append("--label factual (if all summaries are)" if can_be_all else option)
    # In a file without a header its first row is patients' text: names are few, short and different, and a
    # row below them has a longer text
    are_short = all(len(name) <= _LONGEST_NAME and _NAME.fullmatch(name) for name in columns)
    has_text = any(len(str(value)) > _LONGEST_NAME for value in first_row)
    if are_short and has_text and len(set(columns)) == len(columns) <= _MOST_NAMES:
        shown = f": {', '.join(columns)}"
    else:
        shown = f", known: {preview_list(name for name in columns if name in _KNOWN) or 'none'}"
    problem = (
        f"{path}: no column {preview_list(missing)} in the header ({plural(len(columns), 'column')}{shown})"
    )
    return problem, f"the header must name {_header_of(required)}; or use {' '.join(options)}"


def _header_of(required: Sequence[str]) -> str:
    """The columns of a header, for people."""
    return f"{', '.join(required)} (id{', hallucination_type' if 'label' in required else ''} optional)"
