"""Files of notes -> numbered notes with their ids: .txt (one note per file, line or paragraph), tables.

Ids come from the file or are missing: a row's number never stands in for one, it has a field of its own. A
text that looks like one note over many lines is not taken apart unless --one_note says so."""

import hashlib
import io
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from sft.cli import InputError, log, on_main_process, plural, preview_list, safe_id
from sft.data.table import column_name, names_of_columns, read_table
from sft.data.text import clean_text, decode_text, is_blank
from sft.inference.results import RESULT_COLUMNS
from sft.inference.suspicion import suspicion
from sft.options import InferenceConfig, check_words

ID_LIKE = re.compile(
    r"(.*_)?(id|uuid|guid|uid|identifier|mrn|csn|fin|idx|key|accession)"
    r"|(.*_)?(note|row|hadm|patient|subject|encounter|visit|case|record|stay|doc|document|report|study|sample"
    r"|accession|specimen|lab)_?(id|no|nr|num|number)\.?"
)
WORDS_FOR_LINES = 'say what a note is with --one_note: "file" (all is one), "paragraph" or "line"'


class Note(NamedTuple):
    row: int  # of a spreadsheet, the line of a text or its first, or the file's place among several
    id: str | None
    text: object  # what a .jsonl file calls a note may be no text
    kept: Mapping[str, object] = MappingProxyType({})  # --keep_columns, for the output


def read_notes(paths: str | Path | Sequence, config: InferenceConfig | None = None) -> list[Note]:
    """The notes of one file, or of several .txt files or a folder of them, one note each. Logs what is odd
    about their ids. Raises InputError if a file cannot be read."""
    config = config or InferenceConfig()
    paths = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    check_words("--input_file", list(map(str, paths)), {})
    is_one = len(paths) == 1 and not paths[0].is_dir()
    kind = paths[0].suffix.lower() if is_one else ".txt"
    if kind == ".txt" and (config.id_column or config.note_column or config.keep_columns):
        problem = "--id_column, --note_column and --keep_columns need a table (.csv, .tsv, .json or .jsonl)"
        raise InputError(problem, "leave them out")
    if config.one_note != "auto" and (kind != ".txt" or not (is_one or config.one_note == "file")):
        problem = f"--one_note {config.one_note} is for one .txt; tables have one note per row, several files one each"
        raise InputError(problem, "leave it out")
    if not is_one:
        notes = [Note(i, _id_of(file), decode_text(file)) for i, file in enumerate(_text_files(paths), 1)]
    elif kind == ".txt":
        units = split_text(str(paths[0]), decode_text(paths[0]), config.one_note, "line")
        file_id = _id_of(paths[0]) if config.one_note == "file" else None
        notes = [Note(row, file_id, text) for row, text in units]
    elif kind in (".csv", ".tsv", ".json", ".jsonl"):
        notes = list(_read_table(paths[0], config))
    else:
        fix = "use .txt, .csv, .tsv, .json, .jsonl (one JSON object per line), or a folder of .txt files"
        is_excel = kind.startswith((".xls", ".ods"))
        raise InputError(f"{paths[0]}: unknown file extension", 'save it as "CSV UTF-8"' if is_excel else fix)
    return _checked_ids(notes, paths[0])


def notes_digest(notes: Sequence[Note]) -> str:
    """SHA-256 of all that the notes bring into the output."""
    digest = hashlib.sha256()
    for note in notes:
        digest.update(json.dumps([*note[:3], dict(note.kept)]).encode() + b"\n")
    return digest.hexdigest()


# ------------------------------------------------------------------------------- texts


def _id_of(file: Path) -> str:
    """Its name without the extension. Bytes that are no UTF-8 are escaped: replaced, two names could become
    one."""
    return os.fsencode(file.stem).decode(errors="backslashreplace")


def _text_files(paths: Sequence[Path]) -> list[Path]:
    """Files and those of folders, which have to be .txt; others in a folder are left out, which is logged."""
    files = []
    for path in paths:
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        texts = [file for file in found if file.suffix.lower() == ".txt" and not file.name.startswith(".")]
        files += texts
        n_others = len(found) - len(texts)
        if not path.is_dir() and n_others:
            raise InputError(f"{path}: not .txt", "of several files, each has to be a .txt")
        if n_others and on_main_process():
            log(f"warning: {path}: {plural(n_others, 'file')} without the extension .txt left out")
    return files


def split_text(name: str, text: str, one_note: str, default: str) -> list[tuple[int, str]]:
    """(line number, text) of each note in `text`. With "auto" a note is a `default` ("line" or "paragraph"),
    unless these look like parts of notes: then the user is asked on a terminal, and it is an InputError
    elsewhere. Logs it if "auto" takes a text as several notes."""
    if one_note == "auto":
        units = list(_units(text, default))
        reason = suspicion([unit for _, unit in units])
        if not reason:
            if len(units) > 1 and on_main_process():
                log(f"{name}: {len(units):,} notes, one a {default}; --one_note file if it is one note")
            return units
        one_note = _ask(f"{name}: looks like notes of several {default}s ({reason})")
    return list(_units(text, one_note))


def as_notes(container: object) -> list:
    """What a caller in Python passes as notes, in its order; of a DataFrame the column clinical_note, whose
    name is read as in files. Raises InputError for what holds no notes, or not in an order."""
    names = {column_name(str(name)): name for name in getattr(container, "columns", ())}
    if "clinical_note" in names:
        return list(container[names["clinical_note"]])
    # Letters, keys or column names would be taken for notes
    is_other = isinstance(container, str | bytes | Mapping | Set) or hasattr(container, "columns")
    if is_other or not isinstance(container, Iterable):
        fix = 'pass the notes in their order: [note], df["clinical_note"], or list(notes.values())'
        raise InputError(f"clinical_notes is a {type(container).__name__}, not a list of notes", fix)
    return list(container)


def _ask(problem: str) -> str:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError(problem, WORDS_FOR_LINES)
    log(problem)
    while True:
        log("One note is a ... (file, paragraph or line)?")
        answer = sys.stdin.readline()
        if answer.strip().lower() in ("file", "paragraph", "line"):
            return answer.strip().lower()
        if not answer:
            raise InputError(problem, WORDS_FOR_LINES)


def _units(text: str, one_note: str) -> Iterator[tuple[int, str]]:
    lines = list(enumerate(io.StringIO(text, newline=None), 1))
    unit = []
    for number, line in [*lines, (0, "")]:
        ends_unit = one_note == "line" or not number or (one_note == "paragraph" and not line.strip())
        if unit and ends_unit:
            yield unit[0][0], "".join(line for _, line in unit)
            unit = []
        if line.strip() or unit:
            unit.append((number, line))


# ------------------------------------------------------------------------------- tables


def _read_table(path: Path, config: InferenceConfig) -> Iterator[Note]:
    names = {"clinical_note": config.note_column, "id": config.id_column}
    ours = names_of_columns(names)
    keep = {name: ours.get(column_name(name), column_name(name)) for name in config.keep_columns or ()}
    taken = [name for name in keep if name.lower() in ("id", "row", *RESULT_COLUMNS)]
    if taken:
        problem = f"--keep_columns {preview_list(taken)}: the output has a column of this name already"
        raise InputError(problem, "rename the column, or leave it out")
    bad = defaultdict(list)
    for i, (row_number, cells, problem) in enumerate(read_table(path, ("clinical_note",), columns=names)):
        row_id = clean_text(cells.get("id", ""))
        row_id = None if is_blank(row_id) else row_id
        # As programs write a large number; 12345e67 is an id of hexadecimal digits
        if row_id and re.fullmatch(r"-?\d(\.\d+)?[eE]\+\d+", row_id):
            problem = f"{path}: row {row_number:,}: the id has lost digits as a decimal number"
            raise InputError(problem, "write ids as text")
        if problem:
            bad[problem].append(f"row {row_number:,}" + (f" (id {safe_id(row_id)})" if row_id else ""))
        if i == 0:
            _check_columns(path, list(cells), keep)
        kept = {name: cells.get(column) for name, column in keep.items()}
        yield Note(row_number, row_id, cells.get("clinical_note", ""), kept)
    if bad:
        problems = "; ".join(f"{problem}: {preview_list(rows)}" for problem, rows in bad.items())
        raise InputError(
            f"{path}: {problems}", "fix these rows: put quotes around cells, and double quotes within"
        )


def _check_columns(path: Path, columns: Sequence[str], keep: dict[str, str]) -> None:
    """Raises InputError for a column to keep that is not there; logs a column that may be the id."""
    absent = [name for name, column in keep.items() if column not in columns]
    if absent:
        names = preview_list(map(safe_id, absent))
        raise InputError(f"{path}: no column {names}, or more than one", "check --keep_columns")
    others = [name for name in columns if ID_LIKE.fullmatch(name)]
    if "id" not in columns and others and on_main_process():
        named = preview_list(others)
        log(f"warning: {path}: no column id; if one of {named} is the id, add --id_column {others[0]}")


# ------------------------------------------------------------------------------- ids


def _checked_ids(notes: list[Note], path: Path) -> list[Note]:
    """The notes with ids like 3.0 as 3, unless others have decimals. Logs repeated and missing ones."""
    given = [note.id for note in notes if note.id is not None]
    said = []
    whole = [row_id for row_id in given if re.fullmatch(r"-?\d+\.0", row_id)]
    if whole and len(whole) == sum(bool(re.fullmatch(r"-?\d+\.\d+", row_id)) for row_id in given):
        shorter = {row_id: row_id.removesuffix(".0") for row_id in whole}
        notes = [note._replace(id=shorter.get(note.id, note.id)) for note in notes]
        given = [shorter.get(row_id, row_id) for row_id in given]
        said.append(f"{plural(len(whole), 'id')} like 3.0: written as 3")
    repeated = [row_id for row_id, n in Counter(given).items() if n > 1]
    if repeated:
        named = preview_list(map(safe_id, repeated))
        said.append(f'{plural(len(repeated), "id")} on more than one row ({named}): "row" tells them apart')
    if given and len(given) < len(notes):
        rows = preview_list(f"{note.row:,}" for note in notes if note.id is None)
        said.append(f"{plural(len(notes) - len(given), 'row')} without an id (row {rows})")
    if on_main_process():
        for words in said:
            log(f"warning: {path}: {words}")
    return notes
