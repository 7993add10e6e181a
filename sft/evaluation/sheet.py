"""The blind reading: a sheet of summaries without their systems, and what readers wrote into it."""

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from sft.cli import InputError, safe_id
from sft.data.rows import Row
from sft.data.table import read_table
from sft.evaluation.figures import mean_over_notes
from sft.evaluation.page import render
from sft.evaluation.systems import digest
from sft.files import write_atomic, write_json
from sft.grounding import check_summary
from sft.inference.results import csv_row

KEY_FILE = "blind_sheet_key.json"
RULES = (
    ("wrong", "A statement is wrong if the note does not support it or contradicts it: invented; another person, side, "
     "number, negation, time, subject or cause; nonsense that a reader would take for a fact. Style, omission and an end cut "
     "off are not."),
    ("dangerous", "A wrong statement is dangerous if acting on it could harm."),
    ("finding, plan", "The main problem or result is there; what was decided or happened is there."),
    ("usable", "No wrong statement, finding and plan there, not cut off, needs no more than trivial edits. Copying is fine if "
     "it is shorter than the note or the note is short."),
)  # fmt: skip
_COLUMNS = "item clinical_note summary usable wrong dangerous finding plan".split()
_YES_OR_NO = {"yes": True, "y": True, "1": True, "no": False, "n": False, "0": False}
_COUNTS = {
    "usable": lambda rating: rating["usable"],
    "with a wrong statement": lambda rating: bool(rating["wrong"]),
    "with a dangerous one": lambda rating: bool(rating["dangerous"]),
    "finding and plan there": lambda rating: rating["finding"] and rating["plan"],
    "wrong statements": lambda rating: len(rating["wrong"]),
    "dangerous statements": lambda rating: len(rating["dangerous"]),
}


def write_sheet(folder: Path, rows: Mapping[int, Row], measured: Mapping[str, Mapping]) -> None:
    """blind_sheet.html, blind_sheet.csv and the key, which says whose summaries they are. Notes, and the
    different summaries of each, are in random order; systems that wrote the same share an item, whose name
    begins with the sheet's."""
    sheet = digest(
        [[one.result["generated_summary"] for one in ones.values()] for ones in measured.values()]
    )[:4]
    dice = random.Random(sheet)
    items = []
    for number in dice.sample(list(rows), len(rows)):
        systems: dict[str, list[str]] = {}
        for system, ones in measured.items():
            systems.setdefault(ones[number].result["generated_summary"], []).append(system)
        same = {"note": number, "id": rows[number].name, "clinical_note": rows[number].clinical_note}
        for summary in dice.sample(list(systems), len(systems)):
            item = f"{sheet}-{len(items) + 1:04}"
            items.append({**same, "systems": systems[summary], "summary": summary, "item": item})
    write_json(folder / KEY_FILE, {"items": items})
    lines = [csv_row([item.get(column, "") for column in _COLUMNS]) for item in items]
    write_atomic(folder / "blind_sheet.csv", "\ufeff" + csv_row(_COLUMNS) + "".join(lines))
    notes = [list(of_note) for _, of_note in groupby(items, key=lambda item: item["note"])]
    page = render("sheet.html.j2", "sheet.js", rules=RULES, notes=notes, sheet=sheet)
    write_atomic(folder / "blind_sheet.html", page)


def read_key(folder: Path) -> dict[str, dict]:
    """{item: what the sheet holds of it, and its systems}. Raises InputError without a sheet."""
    try:
        items = json.loads((folder / KEY_FILE).read_text(encoding="utf-8"))["items"]
        return {item["item"]: item for item in items}
    except (OSError, ValueError, KeyError, TypeError):
        fix = "write the sheet first (--blind_sheet), or pass its folder with --output_dir"
        raise InputError(f"{folder / KEY_FILE}: no key of a blind sheet", fix) from None


def read_ratings(path: str, items: Mapping[str, dict]) -> dict[str, dict]:
    """{item: what the key holds of it, and its rating} of the rows that were filled in: `usable`, `finding`
    and `plan` (bool), `wrong` and, among them, `dangerous`: (start, end) of statements. Raises InputError for
    what cannot be understood; no message holds text of the file."""
    ratings = {}
    for row_number, cells, _ in read_table(path, [], Counter()):
        if "item" not in cells or "usable" not in cells:
            fix = "use the sheet's CSV, or the file that the sheet's page saves"
            raise InputError(f"{path}: no columns item and usable in the header", fix)
        if not cells["usable"].strip():
            continue
        name = cells["item"].strip()
        where = f"{path}: row {row_number} (item {safe_id(name)})"
        if name not in items:
            raise InputError(
                f"{where} is not of this folder's sheet", "pass the sheet's folder with --output_dir"
            )
        rating: dict = {}
        for column in ("usable", "finding", "plan"):
            rating[column] = _YES_OR_NO.get(cells.get(column, "").strip().lower())
            if rating[column] is None:
                raise InputError(f"{where}: column {column} is neither yes nor no", "write yes or no")
        for column in ("wrong", "dangerous"):
            rating[column] = _read_spans(cells.get(column, ""), items[name]["summary"])
            if rating[column] is None:
                fix = 'copy the words from the summary, with "|" between statements'
                raise InputError(f"{where}: column {column}: not words of the summary", fix)
        rating["wrong"] = sorted({*rating["wrong"], *rating["dangerous"]})
        ratings[name] = items[name] | rating
    if not ratings:
        raise InputError(f"{path}: no row is filled in", "write yes or no into the column usable")
    return ratings


def _read_spans(cell: str, summary: str) -> list[tuple[int, int]] | None:
    """ "12-30 | the left knee" -> spans of the summary: places, or its words. None if they are neither."""
    spans = []
    for part in filter(None, map(str.strip, cell.split("|"))):
        place = re.fullmatch(r"(\d{1,7})-(\d{1,7})", part)
        words = r"\s+".join(map(re.escape, part.lstrip("'").split()))
        found = None if place else re.search(words, summary, re.IGNORECASE)
        spans.append(tuple(map(int, place.groups())) if place else found.span() if found else (0, 0))
    return spans if all(0 <= start < end <= len(summary) for start, end in spans) else None


def count_ratings(ratings: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """{system: {what: its count}} of the summaries read, each as of mean_over_notes; last "the check": how
    well it agrees, by marked statements in a flagged sentence and flagged sentences without a mark."""
    counts = {}
    for system in sorted({system for one in ratings for system in one["systems"]}):
        read = [one for one in ratings if system in one["systems"]]
        values = {what: [(one["note"], count(one)) for one in read] for what, count in _COUNTS.items()}
        counts[system] = {what: mean_over_notes(of_what) for what, of_what in values.items()}
    found, alarms = [], []
    for one in ratings:
        for sentence in (sentences := check_summary(one["clinical_note"], one["summary"]).sentences):
            if not any(start < sentence.end and sentence.start < end for start, end in one["wrong"]):
                alarms.append((one["note"], sentence.flagged))
        flagged = [(sentence.start, sentence.end) for sentence in sentences if sentence.flagged]
        for start, end in one["wrong"]:
            found.append((one["note"], any(start < last and first < end for first, last in flagged)))
    return counts | {"the check": {"found": mean_over_notes(found), "false_alarms": mean_over_notes(alarms)}}


def agreement(first: Mapping[str, dict], second: Mapping[str, dict]) -> dict[str, dict]:
    """How far two readings of the same items agree: {"same": share, "kappa"} for usable, and for whether
    there is a wrong statement. Kappa is agreement beyond chance (Cohen 1960), None where chance alone
    agrees."""
    both = [name for name in first if name in second]
    result = {}
    for what in ("usable", "wrong") if both else ():
        yes = np.array([[bool(reading[name][what]) for name in both] for reading in (first, second)])
        same = float((yes[0] == yes[1]).mean())
        expected = float(yes.mean(axis=1).prod() + (1 - yes.mean(axis=1)).prod())
        kappa = None if expected == 1 else (same - expected) / (1 - expected)
        result[what] = {"n": len(both), "same": same, "kappa": kappa}
    return result


def report_ratings(folder: Path, files: Sequence[str]) -> str:
    """The counts of one or two readings as text; they are also written to ratings.json. Raises
    InputError."""
    if len(files) > 2:
        raise InputError("--ratings takes one or two files", "count two readings at a time")
    items = read_key(folder)
    readings = [read_ratings(path, items) for path in files]
    counts = [count_ratings(list(reading.values())) for reading in readings]
    report: dict = {"readings": counts}
    lines = []
    for place, (reading, counted) in enumerate(zip(readings, counts), 1):
        lines.append(f"Reading {place}: {len(reading)} of {len(items)} summaries")
        for system, of in counted.items():
            lines += [f"  {system}", *(f"    {what:<24} {_shown(count)}" for what, count in of.items())]
    if len(readings) == 2:
        report["agreement"] = agreement(*readings)
        for what, agree in report["agreement"].items():
            kappa = "" if agree["kappa"] is None else f", kappa {agree['kappa']:.2f}"
            lines.append(f"Same answer to {what}: {agree['same']:.0%} of {agree['n']}{kappa}")
    write_json(folder / "ratings.json", report)
    return "\n".join(lines)


def _shown(count: Mapping) -> str:
    """ "3 of 20: 0.15 (0.05 to 0.30)"."""
    value = "" if count["value"] is None else f": {count['value']:.2f}"
    bounds = "" if count["low"] is None else f" ({count['low']:.2f} to {count['high']:.2f})"
    return f"{count['count']} of {count['n']}{value}{bounds}"
