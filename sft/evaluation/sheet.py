"""The blind reading: a sheet of summaries without their systems, and what readers wrote into it."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sft.cli import InputError, safe_id
from sft.data.rows import Row
from sft.data.table import read_table
from sft.evaluation.page import render
from sft.evaluation.statistics import interval, kappa, ratios, resample
from sft.evaluation.systems import digest
from sft.files import write_atomic, write_json
from sft.grounding import PreparedNote
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


@dataclass
class Rating:
    """What a reader said of one summary. `wrong`: (start, end) of each wrong statement; `dangerous`: those of
    them that could harm."""

    usable: bool
    finding: bool
    plan: bool
    wrong: list[tuple[int, int]]
    dangerous: list[tuple[int, int]]


# ------------------------------------------------------------------------------- writing


def make_items(rows: Mapping[int, Row], summaries: Mapping[str, Mapping[int, str]]) -> list[dict]:
    """The notes in random order, the different summaries of each in random order. Systems that wrote the same
    share an item. The name of an item begins with the sheet's."""
    sheet = digest([rows[n].note_key.hex() for n in rows], sorted(summaries.items()))[:4]
    dice = random.Random(sheet)
    items = []
    for number in dice.sample(list(rows), len(rows)):
        systems: dict[str, list[str]] = {}
        for system, texts in summaries.items():
            if texts[number].strip():
                systems.setdefault(texts[number], []).append(system)
        for summary in dice.sample(list(systems), len(systems)):
            items.append({"note": number, "id": rows[number].name, "systems": systems[summary], "summary": summary,
                          "clinical_note": rows[number].clinical_note})  # fmt: skip
    return [{"item": f"{sheet}-{place:04}", **item} for place, item in enumerate(items, 1)]


def write_sheet(folder: Path, items: Sequence[dict]) -> None:
    """blind_sheet.html, blind_sheet.csv and the key, which says whose summaries they are."""
    lines = [csv_row(_COLUMNS)]
    lines += [csv_row([item["item"], item["clinical_note"], item["summary"], *[""] * 5]) for item in items]
    notes: dict[int, list[dict]] = {}
    for item in items:
        notes.setdefault(item["note"], []).append(item)
    write_json(folder / KEY_FILE, {"items": items})
    write_atomic(folder / "blind_sheet.csv", "\ufeff" + "".join(lines))
    page = render(
        "sheet.html.j2", "sheet.js", rules=RULES, notes=list(notes.values()), sheet=items[0]["item"][:4]
    )
    write_atomic(folder / "blind_sheet.html", page)


# ------------------------------------------------------------------------------- reading


def read_key(folder: Path) -> dict[str, dict]:
    """{item: what the sheet holds of it, and its systems}. Raises InputError without a sheet."""
    try:
        items = json.loads((folder / KEY_FILE).read_text(encoding="utf-8"))["items"]
        return {item["item"]: item for item in items}
    except (OSError, ValueError, KeyError, TypeError):
        fix = "write the sheet first (--blind_sheet), or pass its folder with --output_dir"
        raise InputError(f"{folder / KEY_FILE}: no key of a blind sheet", fix) from None


def read_ratings(path: str, items: Mapping[str, dict]) -> dict[str, Rating]:
    """{item: rating} of the rows that were filled in. Raises InputError for what cannot be understood; no
    message holds text of the file."""
    ratings = {}
    for row_number, cells, _ in read_table(path, [], Counter()):
        name = cells.get("item", "").strip()
        if "item" not in cells or "usable" not in cells:
            fix = "use the sheet's CSV, or the file that the sheet's page saves"
            raise InputError(f"{path}: no columns item and usable in the header", fix)
        if not cells["usable"].strip():
            continue
        where = f"{path}: row {row_number} (item {safe_id(name)})"
        if name not in items:
            raise InputError(
                f"{where} is not of the sheet in this folder", "pass its folder with --output_dir"
            )
        values = {column: _read_answer(cells, column, where) for column in ("usable", "finding", "plan")}
        spans = {
            column: _read_spans(cells.get(column, ""), items[name]["summary"], f"{where}: column {column}")
            for column in ("wrong", "dangerous")
        }
        wrong = sorted({*spans["wrong"], *spans["dangerous"]})
        ratings[name] = Rating(**values, wrong=wrong, dangerous=spans["dangerous"])
    if not ratings:
        raise InputError(f"{path}: no row is filled in", "write yes or no into the column usable")
    return ratings


def _read_answer(cells: Mapping[str, str], column: str, where: str) -> bool:
    answer = _YES_OR_NO.get(cells.get(column, "").strip().lower())
    if answer is None:
        raise InputError(f"{where}: column {column} is neither yes nor no", "write yes or no")
    return answer


def _read_spans(cell: str, summary: str, where: str) -> list[tuple[int, int]]:
    """ "12-30 | the left knee" -> spans of the summary: places, or its words."""
    spans = []
    for part in filter(None, map(str.strip, cell.split("|"))):
        place = re.fullmatch(r"(\d{1,7})-(\d{1,7})", part)
        words = r"\s+".join(map(re.escape, part.lstrip("'").split()))
        found = None if place else re.search(words, summary, re.IGNORECASE)
        start, end = (int(place[1]), int(place[2])) if place else found.span() if found else (0, 0)
        if not 0 <= start < end <= len(summary):
            fix = 'copy the words from the summary, with "|" between statements'
            raise InputError(f"{where}: not words of the summary", fix)
        spans.append((start, end))
    return spans


# ------------------------------------------------------------------------------- counting


def count_ratings(items: Mapping[str, dict], ratings: Mapping[str, Rating]) -> dict[str, dict[str, dict]]:
    """{system: {count: {"count", "n", "value", "low", "high"}}}: shares of the summaries read, with 95 %
    intervals over notes; `statements` per summary."""
    of: dict[str, Callable[[Rating], float]] = {
        "usable": lambda rating: rating.usable,
        "with a wrong statement": lambda rating: bool(rating.wrong),
        "with a dangerous one": lambda rating: bool(rating.dangerous),
        "finding and plan there": lambda rating: rating.finding and rating.plan,
        "wrong statements": lambda rating: len(rating.wrong),
        "dangerous statements": lambda rating: len(rating.dangerous),
    }
    systems = dict.fromkeys(system for name in ratings for system in items[name]["systems"])
    counts = {}
    for system in systems:
        read = [(items[name]["note"], r) for name, r in ratings.items() if system in items[name]["systems"]]
        counts[system] = {
            count: _ratio_over_notes((note, value(rating), 1) for note, rating in read)
            for count, value in of.items()
        }
    return counts


def _ratio_over_notes(values: Iterator[tuple[int, float, float]]) -> dict:
    """The ratio of two sums, from (note, numerator, denominator), with its interval over notes."""
    notes: dict[int, np.ndarray] = {}
    for note, numerator, denominator in values:
        notes[note] = notes.get(note, np.zeros(2)) + np.array((numerator, denominator))
    table = np.array(list(notes.values())).reshape(-1, 2)
    count, n = table.sum(axis=0)
    low, high = (interval(resample(table)) if len(table) else None) or (None, None)
    return {
        "count": int(count),
        "n": int(n),
        "value": float(ratios(table.sum(axis=0))) if n else None,
        "low": low,
        "high": high,
    }


def _overlaps(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


def agreement(first: Mapping[str, Rating], second: Mapping[str, Rating]) -> dict:
    """How far two readings of the same items agree: usable, and whether there is a wrong statement, each with
    Cohen's kappa; the share of all marked statements that the other reading marks as well."""
    both = [(first[name], second[name]) for name in first if name in second]
    marked = [
        _overlaps(span, other.wrong) for a, b in both for one, other in ((a, b), (b, a)) for span in one.wrong
    ]
    result: dict = {"items": len(both)}
    for name, judge in {"usable": lambda r: r.usable, "wrong": lambda r: bool(r.wrong)}.items():
        answers = [[judge(pair[i]) for pair in both] for i in (0, 1)]
        same = sum(map(bool.__eq__, *answers)) / len(both) if both else None
        result[name] = {"same": same, "kappa": kappa(*answers)}
    result["statements"] = {"n": len(marked), "in_both": sum(marked) / len(marked) if marked else None}
    return result


def check_against(items: Mapping[str, dict], ratings: Mapping[str, Rating]) -> dict[str, dict]:
    """How well the check agrees with a reading: marked statements in a flagged sentence, and flagged
    sentences among those without a mark."""
    found = []
    alarms = []
    for name, rating in ratings.items():
        item = items[name]
        for sentence in (sentences := PreparedNote(item["clinical_note"]).check(item["summary"]).sentences):
            if not _overlaps((sentence.start, sentence.end), rating.wrong):
                alarms.append((item["note"], float(sentence.flagged), 1))
        flagged = [(sentence.start, sentence.end) for sentence in sentences if sentence.flagged]
        found += [(item["note"], float(_overlaps(span, flagged)), 1) for span in rating.wrong]
    return {"found": _ratio_over_notes(iter(found)), "false_alarms": _ratio_over_notes(iter(alarms))}


def report_ratings(folder: Path, files: Sequence[str]) -> str:
    """The counts of one or two readings as text; they are also written to ratings.json. Raises
    InputError."""
    if len(files) > 2:
        raise InputError("--ratings takes one or two files", "count two readings at a time")
    items = read_key(folder)
    readings = [read_ratings(path, items) for path in files]
    report = {
        "readings": [{"counts": count_ratings(items, r), "check": check_against(items, r)} for r in readings]
    }
    lines = []
    for place, reading in enumerate(report["readings"], 1):
        lines.append(f"Reading {place}: {len(readings[place - 1])} of {len(items)} summaries")
        for system, counts in sorted(reading["counts"].items()):
            lines.append(f"  {system}")
            lines += [f"    {name:<24} {_shown(count)}" for name, count in counts.items()]
        lines.append(f"  marked statements that the check flags       {_shown(reading['check']['found'])}")
        lines.append(
            f"  unmarked sentences that it flags all the same {_shown(reading['check']['false_alarms'])}"
        )
    if len(readings) == 2:
        report["agreement"] = agree = agreement(*readings)
        lines.append(f"Both readings: {agree['items']} summaries")
        for name in ("usable", "wrong"):
            same, chance = agree[name]["same"], agree[name]["kappa"]
            kappa_shown = "–" if chance is None else f"{chance:.2f}"
            lines.append(
                f"  same answer to {name:<7} {'–' if same is None else f'{same:.0%}'} (kappa {kappa_shown})"
            )
        share = agree["statements"]["in_both"]
        lines.append(f"  marked statements that both mark: {'–' if share is None else f'{share:.0%}'}")
    write_json(folder / "ratings.json", report)
    return "\n".join(lines)


def _shown(count: Mapping) -> str:
    bounds = "" if count["low"] is None else f" ({count['low']:.2f} to {count['high']:.2f})"
    return f"{count['count']} of {count['n']}" + (
        "" if count["value"] is None else f": {count['value']:.2f}{bounds}"
    )
