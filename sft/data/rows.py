"""A table -> checked rows, and what can be said of a set of rows by their texts alone.

What can be repaired safely is repaired, counted and reported once per kind; the rest is refused by row number
and id. No message holds text of the file."""

import dataclasses
import difflib
import functools
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft.cli import InputError, plural, preview_list, safe_id
from sft.data.formats import strip_markup
from sft.data.similar import groups_of_similar, similar_notes
from sft.data.table import (
    COLUMNS,
    OPTION_OF_COLUMN,
    REQUIRED_COLUMNS,
    plain,
    read_table,
    source_name,
)
from sft.data.text import clean_text, is_blank, log_repairs
from sft.grounding.citations import citation_spans, parse_citations, strip_citations
from sft.options import DataOptions

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLUMNS", "Row", "read_rows"]

LABELS = ("factual", "hallucinated")
_SPELLINGS = {"factual": "factual", "hallucinated": "hallucinated", "hallucination": "hallucinated"}
_TEXTS = ("clinical_note", "model_summary")
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
        return self.id if safe_id(self.id) == self.id else f"{self.source} row {self.number}".strip()

    @functools.cached_property
    def note_key(self) -> bytes:
        return _same_text_key(self.clinical_note)

    @functools.cached_property
    def summary_key(self) -> bytes:
        return _same_text_key(self.model_summary)

    @property
    def texts_key(self) -> tuple[bytes, bytes]:
        return self.note_key, self.summary_key


def _same_text_key(text: str) -> bytes:
    """Equal for texts that differ in case and white space alone. A digest, since it takes less memory."""
    words = " ".join(text.casefold().split())
    return hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def name_rows(names: Iterable[str], limit: int = 5) -> str:
    """ "id a", "ids a, b", "row 5", "rows 5, 6", "ids a, row 6": rows by their `name`."""
    names = list(names)
    s = "" if len(names) == 1 else "s"
    if names and all(" " in name for name in names):
        return f"row{s} {preview_list((name.removeprefix('row ') for name in names), limit)}"
    return f"id{s} {preview_list(names, limit)}"


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
    if options.label and (options.label_column or options.label_map):
        raise InputError("--label cannot be combined with --label_column or --label_map", "choose one")
    name = source_name(source)
    columns = {ours: getattr(options, option.removeprefix("--")) for ours, option in OPTION_OF_COLUMN.items()}
    required = REQUIRED_COLUMNS[:2] if options.label else REQUIRED_COLUMNS
    label_of = _SPELLINGS | _label_map(options.label_map)
    rows, problems, labels, unknown, others = [], [], [], [], []
    repairs, empty = Counter(), Counter()
    n_read = 0
    for number, fields, problem in read_table(source, required, repairs, columns):
        # As a DataFrame ends in that was a spreadsheet; a CSV's blank rows are skipped by its reader
        if not any(fields.values()):
            continue
        n_read += 1
        row = _make_row(number, fields, options.label, label_of, repairs)
        missing = [column for column in _TEXTS if is_blank(getattr(row, column))]
        empty.update(missing)
        if missing and options.skip_empty and not problem:
            continue
        rows.append(row)
        if "id" in fields and not row.id:
            repairs["row", "without an id, called by row number"] += 1
        labels.append(plain(fields.get("label", "")))
        if options.label and labels[-1] and label_of.get(labels[-1]) != options.label:
            others.append(labels[-1])
        # Behind a comma outside quotes it is another column's text
        is_shifted = problem or plain(row.hallucination_type) in label_of
        if not (row.label or is_shifted):
            unknown.append(labels[-1])
        elif row.label and not (options.label or options.label_map) and row.label != fields.get("label"):
            repairs["label", f"in a different spelling, read as {' or '.join(LABELS)}"] += 1
        shown_id = f" (id {safe_id(row.id)})" if row.id else ""
        found = _problems(row, problem, is_shifted, missing)
        problems += (f"row {number}{shown_id}: {found_one}" for found_one in found)
    counts = ", ".join(f"{n:,} with an empty {column}" for column, n in sorted(empty.items()))
    # Misspelled ones mean something too
    if others and any(difflib.get_close_matches(label, LABELS, cutoff=0.7) for label in set(labels)):
        n_others = plural(len(others), "row")
        problem = f"--label {options.label}, but the file itself labels {n_others} otherwise"
        raise InputError(f"{name}: {problem}", "leave out --label")
    if others:
        kinds = preview_list(shown_kinds(others) or ["not shown"])
        repairs["label", f"({kinds}) not used: --label {options.label}"] += len(others)
    if problems:
        problem, fix = _refusal(problems, counts, unknown, labels, options.label_map)
        raise InputError(f"{name}: {problem}", fix)
    if not rows:
        why = f"no row is left of {plural(n_read, 'row')}: {counts}" if counts else "no rows below the header"
        raise InputError(f"{name}: {why}", "add rows, at least one of them labeled factual")
    if counts:
        repairs["row", f"left out: {counts}"] += n_read - len(rows)
    log_repairs(name, repairs)
    return rows


def _label_map(text: str | None) -> dict[str, str]:
    """ "no=hallucinated,yes=factual" as a dict. Raises InputError."""
    pairs = [part.rpartition("=") for part in text.split(",")] if text else []
    if not all(equals and plain(label) in LABELS for _, equals, label in pairs):
        fix = "write --label_map yes=factual,no=hallucinated, with the labels of your file"
        raise InputError("--label_map does not map labels to factual or hallucinated", fix)
    meanings = {plain(theirs): plain(ours) for theirs, _, ours in pairs}
    if any(meanings[plain(theirs)] != plain(ours) for theirs, _, ours in pairs):
        fix = "give each label one meaning; upper and lower case are the same"
        raise InputError("--label_map gives one label two meanings", fix)
    return meanings


def _make_row(
    number: int, fields: dict[str, str], label: str | None, label_of: Mapping[str, str], repairs: Counter
) -> Row:
    row_id = fields.get("id", "").strip()
    note, markup = strip_markup(clean_text(fields.get("clinical_note", "")))
    if markup:
        repairs["note", f"in {markup}, read without tags"] += 1
    return Row(
        number=number,
        id="" if is_blank(row_id) else row_id,
        clinical_note=note,
        model_summary=clean_text(fields.get("model_summary", "")),
        label=label or label_of.get(plain(fields.get("label", "")), ""),
        hallucination_type=fields.get("hallucination_type", "").strip(),
    )


def _problems(row: Row, of_cells: str, is_shifted: bool, empty: Sequence[str]) -> Iterator[str]:
    if of_cells:
        yield of_cells
    for column in empty:
        yield f"{column} is empty"
    if not row.label:
        yield f"label is neither {' nor '.join(LABELS)}{' (a comma outside quotes?)' if is_shifted else ''}"


def _refusal(
    problems: Sequence[str], empty: str, unknown: Sequence[str], labels: Sequence[str], label_map: str | None
) -> tuple[str, str]:
    """(problem, fix) for rows that cannot be used; `unknown` are those of all `labels` that no map knows."""
    n_more = len(problems) - _MOST_PROBLEMS
    more = f"; and {n_more:,} more" if n_more > 0 else ""
    shown = f"{plural(len(problems), 'problem')}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}"
    fix = "fix or delete these rows"
    if empty:
        shown += f" (rows: {empty})"
        fix += ", or leave out those with an empty cell: --skip_empty"
    if unknown:
        kinds = [kind for kind in shown_kinds(labels) or [] if kind in unknown]
        counts = ", ".join(f"{unknown.count(kind):,} {kind or '(empty)'}" for kind in kinds)
        pairs = [f"{kind}=?" for kind in filter(None, kinds)] or ["A=?", "B=?"]
        pairs = [label_map] * bool(label_map) + pairs
        advice = f'map each label to factual or hallucinated: --label_map "{",".join(pairs)}"'
        if len(unknown) == len(labels):
            shown = f"no row has a known label; found {plural(len(set(unknown)), 'kind')}: {counts or 'not shown'}"
            return shown, f"{advice}; if all summaries are factual: --label factual"
        shown += f" (unknown labels: {counts or len(unknown)})"
        fix += f", or {advice}"
    return shown, fix


# ------------------------------------------------------------------------------- sets of rows


def factual_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows that Stage A trains on."""
    return [row for row in rows if row.label == "factual"]


def leaked_rows(train: Sequence[Row], validation: Sequence[Row]) -> list[tuple[Row, Row, float]]:
    """(validation row, training row, how alike their notes are) for each validation row whose note is that of
    a training row, or nearly."""
    known = {row.note_key: row for row in reversed(train)}
    new = {row.note_key: row for row in validation if row.note_key not in known}
    twins = {key: (row, 1.0) for key, row in known.items()}
    if known:
        by_place = [*known.values(), *new.values()]
        for note, earlier, share in similar_notes([row.clinical_note for row in by_place], len(known)):
            twins[by_place[note].note_key] = (by_place[earlier], share)
    return [(row, *twins[row.note_key]) for row in validation if row.note_key in twins]


def contradicted_texts(rows: Iterable[Row]) -> set[tuple[bytes, bytes]]:
    """The note and summary (`Row.texts_key`) of rows that are labeled both factual and hallucinated."""
    labels = defaultdict(set)
    for row in rows:
        labels[row.texts_key].add(row.label)
    return {texts for texts, given in labels.items() if len(given) > 1}


def repeated_rows(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By what they repeat, the rows that have an earlier row's note and summary, or its id for another
    note."""
    notes = {}
    texts = set()
    repeated = defaultdict(list)
    for row in rows:
        # Several summaries of one note may share its id; two files may count their rows alike
        known = notes.setdefault((row.source, row.id), row.note_key) if row.id else row.note_key
        if row.texts_key in texts:
            repeated["the note and summary of an earlier row"].append(row)
        elif known != row.note_key:
            repeated["the id of an earlier row with another note"].append(row)
        texts.add(row.texts_key)
    return repeated


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, validation): about `fraction` of the factual rows, chosen by `seed` and the notes alone.

    All rows of a note, and notes that are nearly the same, stay together. Raises InputError if they cannot be
    parted."""
    notes = {row.note_key: row.clinical_note for row in rows}
    group_of = dict(zip(notes, groups_of_similar(list(notes.values()))))
    groups = defaultdict(list)
    for row in rows:
        groups[group_of[row.note_key]].append(row)

    def place(group: int) -> bytes:
        return hashlib.sha256(b"%d" % seed + min(row.note_key for row in groups[group])).digest()

    n_factual = {group: len(factual_rows(members)) for group, members in groups.items()}
    n_all = sum(n_factual.values())
    n_left = max(1, round(fraction * n_all))
    chosen = set()
    for group in sorted(groups, key=place):
        if 0 < n_factual[group] <= n_left:
            chosen.add(group)
            n_left -= n_factual[group]
    if sum(n_factual[group] for group in chosen) in (0, n_all):
        where = f"{plural(len(groups), 'group')} of similar ones"
        problem = f"--val_fraction {fraction}: the notes cannot be parted ({where})"
        raise InputError(problem, "add rows, use a larger fraction, or pass --val_csv FILE")
    train = [row for row in rows if group_of[row.note_key] not in chosen]
    return train, [row for row in rows if group_of[row.note_key] in chosen]


def drop_stray_citations(rows: Sequence[Row], sentence_version: int | None) -> tuple[list[Row], list[str]]:
    """(rows, names of the changed ones): a summary loses its citations if the prompt does not number the
    note's sentences (no `sentence_version`), or one of them does not exist. They would teach numbers that
    nothing supports."""
    kept = []
    stray = []
    for row in rows:
        if sentence_version is None:
            is_stray = bool(citation_spans(row.model_summary))
        else:
            citations = parse_citations(row.model_summary, row.clinical_note, sentence_version)
            is_stray = any(citation["missing"] for citation in citations)
        if is_stray:
            stray.append(row.name)
            row = dataclasses.replace(row, model_summary=strip_citations(row.model_summary))
        # Nothing but a citation: no row
        if row.model_summary:
            kept.append(row)
    return kept, stray
