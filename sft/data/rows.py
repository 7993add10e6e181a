"""A table -> checked rows, and what can be said of a set of rows by their texts alone.

What can be repaired safely is repaired, counted and reported once per kind; the rest is refused by row number
and id. No message holds text of the file.
"""

import dataclasses
import functools
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft.cli import InputError, plural, preview_list, safe_id
from sft.data.formats import strip_markup
from sft.data.similar import groups_of_similar, similar_notes
from sft.data.table import COLUMNS, OPTION_OF_COLUMN, REQUIRED_COLUMNS, TOO_MANY_FIELDS, plain, read_table
from sft.data.text import Repair, clean_text, is_blank, log_repairs
from sft.grounding.citations import has_citation, parse_citations, strip_citations, unreadable_citations
from sft.options import DataOptions

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLUMNS", "TOO_MANY_FIELDS", "Row", "read_rows", "read_table"]

LABELS = ("factual", "hallucinated")

_LABEL_SPELLING = Repair("label", f"in a different spelling, read as {' or '.join(LABELS)}")
_NO_ID = Repair("row", "without an id, called by row number")
_SPELLINGS = {"factual": "factual", "hallucinated": "hallucinated", "hallucination": "hallucinated"}
_WHOLE_ROW = re.compile(rf"""[,;\t]"?({"|".join(LABELS)})"?([,;\t]|$)""", re.IGNORECASE | re.MULTILINE)
_MOST_PROBLEMS = 5  # in one message
_MOST_KINDS = 8  # of labels or types that are shown; more, or longer ones, may be patients' text
_LONGEST_KIND = 30  # characters


@dataclass(frozen=True)
class Row:
    number: int  # as a spreadsheet counts: the header is row 1; a line of .jsonl, a record of .json
    id: str  # "" if the row has none
    clinical_note: str
    model_summary: str
    label: str  # one of LABELS
    hallucination_type: str = ""
    source: str = ""  # the file's name, where there are several

    @property
    def name(self) -> str:
        """How messages call the row: its id, or its number if it has none or one that may be text."""
        shown = safe_id(self.id)
        where = f"{self.source} " if self.source else ""
        return shown if shown == self.id else f"{where}row {self.number}"

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


def name_rows(names: Iterable[str], limit: int = 5) -> str:
    """ "id a", "ids a, b", "row 5": rows by their `name`."""
    names = list(names)
    have_ids = not any(" " in name for name in names)
    word = "id" if have_ids else "" if len(names) == 1 else "rows"
    if not have_ids and len(names) > 1:
        names = [name.removeprefix("row ") for name in names]
    elif have_ids and len(names) != 1:
        word = "ids"
    return f"{word} {preview_list(names, limit)}".strip()


def shown_kinds(values: Iterable[str]) -> list[str] | None:
    """The different values, most common first, if so few and short that they are kinds, not texts."""
    kinds = Counter(values)
    few = len(kinds) <= _MOST_KINDS and 2 * len(kinds) <= kinds.total()
    short = all(len(kind) <= _LONGEST_KIND and kind.isprintable() for kind in kinds)
    return [kind for kind, _ in kinds.most_common()] if few and short else None


# ------------------------------------------------------------------------------- reading


def read_rows(source: "str | Path | pd.DataFrame", options: DataOptions | None = None) -> list[Row]:
    """All rows of a table, checked; without those with an empty cell if `options.skip_empty`.

    Raises InputError with the bad rows' numbers and ids."""
    options = options or DataOptions()
    name = str(source) if isinstance(source, str | Path) else "the DataFrame"
    columns = {ours: getattr(options, option.removeprefix("--")) for ours, option in OPTION_OF_COLUMN.items()}
    required = [column for column in REQUIRED_COLUMNS if not (column == "label" and options.label)]
    label_of = {**_SPELLINGS, **_label_map(options.label_map)}
    rows = []
    problems = []
    repairs = Counter()
    empty = Counter()
    unknown = []
    labels = []
    n_read = 0
    for row_number, fields, has_more in read_table(source, required, repairs, columns):
        # As a DataFrame ends in that was a spreadsheet; a CSV's blank rows are skipped by its reader
        if not any(fields.values()):
            continue
        n_read += 1
        row = _make_row(row_number, fields, options.label, label_of, repairs)
        missing = [cell for cell in ("clinical_note", "model_summary") if is_blank(getattr(row, cell))]
        empty.update(missing)
        if missing and options.skip_empty:
            continue
        rows.append(row)
        if "id" in fields and not row.id:
            repairs[_NO_ID] += 1
        labels.append(plain(fields.get("label", "")))
        # Behind a comma outside quotes it is another column's text
        is_shifted = has_more or plain(row.hallucination_type) in label_of
        if not (row.label or is_shifted):
            unknown.append(labels[-1])
        elif row.label and not (options.label or options.label_map) and row.label != fields.get("label"):
            repairs[_LABEL_SPELLING] += 1
        shown_id = f" (id {safe_id(row.id)})" if row.id else ""
        found = _problems(row, has_more, is_shifted, missing)
        problems += (f"row {row_number}{shown_id}: {problem}" for problem in found)
    counts = ", ".join(f"{n:,} with an empty {column}" for column, n in sorted(empty.items()))
    if unknown and len(unknown) == len(rows):
        raise InputError(*_unknown_labels(name, unknown))
    if problems:
        raise InputError(*_refusal(name, problems, counts, unknown, labels, options.label_map))
    if not rows:
        why = f"no row is left of {plural(n_read, 'row')}: {counts}" if counts else "no rows below the header"
        raise InputError(f"{name}: {why}", "add rows, at least one of them labeled factual")
    if counts:
        repairs[Repair("row", f"left out: {counts}")] += n_read - len(rows)
    log_repairs(name, repairs)
    return rows


def _label_map(text: str | None) -> dict[str, str]:
    """ "no=hallucinated,yes=factual" as a dict. Raises InputError."""
    pairs = [part.rpartition("=") for part in text.split(",")] if text else []
    if not all(equals and plain(label) in LABELS for _, equals, label in pairs):
        fix = "write --label_map yes=factual,no=hallucinated, with the labels of your file"
        raise InputError("--label_map does not map labels to factual or hallucinated", fix)
    return {plain(theirs): plain(ours) for theirs, _, ours in pairs}


def _unknown_labels(name: str, labels: list[str]) -> tuple[str, str]:
    """(problem, fix) for a file of which no row has a known label."""
    kinds = shown_kinds(labels)
    found = f"found {plural(len(set(labels)), 'kind')}"
    example = "A=factual,B=hallucinated"
    if kinds and kinds != [""]:
        found += f": {preview_list((kind or '(empty)' for kind in kinds), _MOST_KINDS)}"
        if len(kinds) == 2 and all(kinds):
            example = f"{kinds[0]}=factual,{kinds[1]}=hallucinated (or the other way round)"
    fix = f"map them with --label_map {example}; if all summaries are factual: --label factual"
    return f"{name}: no row has a known label; {found}", fix


def _refusal(
    name: str,
    problems: list[str],
    empty: str,
    unknown: list[str],
    labels: list[str],
    label_map: str | None,
) -> tuple[str, str]:
    """(problem, fix) for rows that cannot be used; `unknown` are those of all `labels` that no map knows."""
    n_more = len(problems) - _MOST_PROBLEMS
    shown = "; ".join(problems[:_MOST_PROBLEMS]) + (f"; and {n_more:,} more" if n_more > 0 else "")
    fix = "fix or delete these rows"
    if empty:
        shown += f" (rows: {empty})"
        fix += ", or leave out those with an empty cell: --skip_empty"
    if unknown:
        kinds = [kind for kind in shown_kinds(labels) or [] if kind and kind in unknown]
        counts = ", ".join(f"{unknown.count(kind):,} {kind}" for kind in kinds) or f"{len(unknown):,}"
        shown += f" (unknown labels: {counts})"
        mapped = [f"{kind}=hallucinated" for kind in kinds] or ["A=factual", "B=hallucinated"]
        fix += f", or map labels: --label_map {','.join([label_map] * bool(label_map) + mapped)} (or factual)"
    return f"{name}: {plural(len(problems), 'problem')}: {shown}", fix


def _make_row(
    row_number: int, fields: dict[str, str], label: str | None, label_of: Mapping[str, str], repairs: Counter
) -> Row:
    row_id = fields.get("id", "").strip()
    note, markup = strip_markup(clean_text(fields.get("clinical_note", "")))
    if markup:
        repairs[Repair("note", f"in {markup}, read without tags")] += 1
    return Row(
        number=row_number,
        id="" if is_blank(row_id) else row_id,
        clinical_note=note,
        model_summary=clean_text(fields.get("model_summary", "")),
        label=label or label_of.get(plain(fields.get("label", "")), ""),
        hallucination_type=fields.get("hallucination_type", "").strip(),
    )


def _problems(row: Row, has_more_fields: bool, is_shifted: bool, empty: list[str]) -> Iterator[str]:
    if has_more_fields:
        yield TOO_MANY_FIELDS
    for name in ("clinical_note", "model_summary"):
        text = getattr(row, name)
        if name in empty:
            yield f"{name} is empty"
        elif "\n" in text and _WHOLE_ROW.search(text):
            yield f"{name} contains other rows (an unclosed quote?)"
    if not row.label:
        yield f"label is neither {' nor '.join(LABELS)}{' (a comma outside quotes?)' if is_shifted else ''}"


# ------------------------------------------------------------------------------- sets of rows


def factual_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows that Stage A trains on."""
    return [row for row in rows if row.label == "factual"]


def leaked_rows(train: Sequence[Row], validation: Sequence[Row]) -> list[tuple[Row, Row, float]]:
    """(validation row, training row, how alike their notes are) for each validation row whose note is that of
    a training row, or nearly."""
    known = {row.note_key: row for row in reversed(train)}
    others = {row.note_key: row for row in validation if row.note_key not in known}
    like = {key: (row, 1.0) for key, row in known.items()}
    if known and others:
        training = list(known.values())
        notes = [row.clinical_note for row in (*training, *others.values())]
        keys = list(others)
        for note, earlier, share in similar_notes(notes, len(training)):
            like[keys[note - len(training)]] = (training[earlier], share)
    return [(row, *like[row.note_key]) for row in validation if row.note_key in like]


def repeated_rows(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By what they repeat, the rows that have an earlier row's note and summary, or its id for another
    note."""
    notes = {}
    texts = set()
    repeated = defaultdict(list)
    for row in rows:
        text = (row.note_key, row.summary_key)
        # Several summaries of one note may share its id; two files may count their rows alike
        known = notes.setdefault((row.source, row.id), row.note_key) if row.id else row.note_key
        if text in texts:
            repeated["the note and summary of an earlier row"].append(row)
        elif known != row.note_key:
            repeated["the id of an earlier row with another note"].append(row)
        texts.add(text)
    return repeated


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, validation): about `fraction` of the factual rows, chosen by `seed` and the notes alone.

    All rows of a note, and notes that are nearly the same, stay together. Raises InputError if they cannot be
    parted.
    """
    notes = {row.note_key: row.clinical_note for row in rows}
    groups: dict[int, list[bytes]] = {}
    for key, group in zip(notes, groups_of_similar(list(notes.values()))):
        groups.setdefault(group, []).append(key)
    n_factual = dict.fromkeys(notes, 0)
    for row in rows:
        n_factual[row.note_key] += row.label == "factual"
    sizes = {min(keys): sum(n_factual[key] for key in keys) for keys in groups.values()}
    members = {min(keys): keys for keys in groups.values()}
    shuffled = sorted(sizes, key=lambda key: hashlib.sha256(b"%d" % seed + key).digest())
    n_wanted = max(1, round(fraction * sum(sizes.values())))
    chosen = set()
    n_chosen = 0
    for key in shuffled:
        if 0 < sizes[key] <= n_wanted - n_chosen:
            chosen |= set(members[key])
            n_chosen += sizes[key]
    if not n_chosen or n_chosen == sum(sizes.values()):
        problem = f"--val_fraction {fraction}: the notes cannot be parted ({plural(len(groups), 'group')} of similar ones)"
        raise InputError(problem, "add rows, use a larger fraction, or pass --val_csv FILE")
    train = [row for row in rows if row.note_key not in chosen]
    return train, [row for row in rows if row.note_key in chosen]


def drop_stray_citations(rows: Sequence[Row], sentence_version: int | None) -> tuple[list[Row], list[str]]:
    """(rows, names of the changed ones): a summary loses its citations if the prompt does not number the
    note's sentences (no `sentence_version`), or one of them does not exist. They would teach numbers that
    nothing supports."""
    kept = []
    stray = []
    for row in rows:
        if sentence_version is None:
            is_stray = has_citation(row.model_summary) or bool(unreadable_citations(row.model_summary))
        else:
            is_stray = cites_missing_sentence(row, sentence_version)
        if is_stray:
            stray.append(row.name)
            summary = strip_citations(row.model_summary)
            # Nothing but a citation: no row
            if not summary:
                continue
            row = dataclasses.replace(row, model_summary=summary)
        kept.append(row)
    return kept, stray


def cites_missing_sentence(row: Row, sentence_version: int) -> bool:
    citations = parse_citations(row.model_summary, row.clinical_note, sentence_version)
    return any(citation["missing"] for citation in citations)
