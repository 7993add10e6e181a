"""The report as one HTML file that opens from disk without network, and the figures as a CSV."""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sft.data.rows import Row
from sft.evaluation.figures import changes
from sft.evaluation.measures import HEADLINE, MEASURES, Measure, Measured
from sft.files import write_atomic
from sft.grounding.sentences import sentence_spans
from sft.inference.results import csv_row, describe_finding

ANSWERS = {True: "yes", False: "no", None: "not shown"}
_MOST_NOTES = 300  # on the page, failures first: a browser has to hold them
_BY_NAME = {measure.name: measure for measure in MEASURES}


def render(template: str, script: str, **values) -> str:
    """A page from the templates beside this file. Everything is escaped but our own style and script; the
    policy in the page's head lets no other script run and forbids every request."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    loader = FileSystemLoader(folder)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    code = (folder / script).read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; img-src data:"
    style = (folder / "page.css").read_text(encoding="utf-8")
    page = environment.get_template(template)
    return page.render(policy=policy, style=Markup(style), script=Markup(code), **values)


def shown(measure: Measure, figure: Mapping | None, part: str = "value") -> str:
    """ "12.5" for a share of .125; "–" for what is not there."""
    value = None if figure is None else figure[part]
    return "–" if value is None else f"{value * measure.scale:.{2 if measure.scale == 1 else 1}f}"


def change_in_words(found: Mapping[str, dict], system: str, name: str) -> str:
    """ "Coverage, %: 61.0, base 52.3 (difference 8.7, 3.1 to 14.0)"."""
    measure = _BY_NAME[name]
    minus = found[system][name]["minus"]["base"]
    values = f"{shown(measure, found[system][name])}, base {shown(measure, found['base'][name])}"
    bounds = f"{shown(measure, minus, 'low')} to {shown(measure, minus, 'high')}"
    return f"{measure.title}: {values} (difference {shown(measure, minus)}, {bounds})"


def figure_rows(found: Mapping[str, dict], names: Sequence[str]) -> list[dict]:
    """The rows of a table of measures: for each system the value, its interval, and where a small chart draws
    them, on one scale (0 to 100) for the whole row."""
    rows = []
    moved = {system: changes(found, system) for system in found}
    for measure in (_BY_NAME[name] for name in names):
        figures = {system: found[system].get(measure.name) for system in found}
        ends = [
            f[end] for f in figures.values() if f for end in ("value", "low", "high") if f[end] is not None
        ]
        cells = []
        for system, figure in figures.items():
            cell = {"system": system, "value": shown(measure, figure), "interval": "", "chart": None}
            if figure and figure["low"] is not None:
                low, high = (shown(measure, figure, end) for end in ("low", "high"))
                bound = f"at least {low}" if figure["value"] else f"at most {high}"
                cell["interval"] = bound if figure.get("is_bound") else f"{low} to {high}"
                places = (figure[end] - min(ends) for end in ("low", "value", "high"))
                cell["chart"] = [round(4 + 92 * p / (max(ends) - min(ends) or 1), 1) for p in places]
            better, worse = (measure.name in names for names in moved[system])
            cell["change"] = "better" if better else "worse" if worse else ""
            cells.append(cell)
        if ends:
            rows.append({"title": measure.title, "explanation": measure.explanation, "cells": cells})
    return rows


def _sentences(one: Measured) -> list[dict]:
    """The summary's sentences, each cut into (text, kind of finding or "")."""
    sentences = []
    for checked in one.check.sentences:
        pieces = []
        position = checked.start
        inside = [f for f in one.check.findings if checked.start <= f.start and f.end <= checked.end]
        for finding in sorted(inside, key=lambda finding: finding.start):
            if finding.start >= position:
                pieces.append((one.summary[position : finding.start], ""))
                pieces.append((one.summary[finding.start : finding.end], finding.kind))
                position = finding.end
        pieces.append((one.summary[position : checked.end], ""))
        support = checked.support if checked.supported_share else []
        sentences.append({"pieces": pieces, "support": support, "flagged": checked.flagged})
    return sentences


def _summary(system: str, one: Measured) -> dict:
    """What a card shows of one system's summary; findings that are the same stand once."""
    counts = Counter(f"{finding.kind}: {describe_finding(asdict(finding))}" for finding in one.check.findings)
    return {
        "system": system,
        "sentences": _sentences(one),
        "findings": [words if n == 1 else f"{words} ({n} times)" for words, n in counts.items()],
        "state": [name for name in ("empty", "repeats", "cut") if one.sums[name][0]],
        "fails": one.fails,
    }


def note_cards(rows: Mapping[int, Row], measured: Mapping, trained: set[str], version: int) -> list[dict]:
    """What the page shows of each note, those on which a `trained` system fails first if there are too
    many."""
    cards = []
    for place, (number, row) in enumerate(rows.items()):
        spans = sentence_spans(row.clinical_note, version)
        summaries = [_summary(system, ones[number]) for system, ones in measured.items()]
        card = {"place": place, "name": row.name, "n_words": len(row.clinical_note.split())}
        card["sentences"] = [row.clinical_note[start:end] for start, end in spans]
        card["summaries"] = summaries
        card["fails"] = [summary["system"] for summary in summaries if summary["fails"]]
        card["n_findings"] = sum(len(s["findings"]) for s in summaries if s["system"] in trained)
        cards.append(card)
    chosen = sorted(cards, key=lambda card: not trained & set(card["fails"]))[:_MOST_NOTES]
    return sorted(chosen, key=lambda card: card["place"])


def write_report(
    path: Path, rows: Mapping[int, Row], measured: Mapping, evaluation: Mapping, version: int
) -> None:
    """report.html. `evaluation`: what evaluation.json holds; `version`: of the notes' sentence numbers."""
    found = evaluation["figures"]
    words = {
        system: {kind: [change_in_words(found, system, n) for n in names] for kind, names in lists.items()}
        for system, lists in evaluation["changes"].items()
        if "base" in found
    }
    groups = {name: figure_rows(group["figures"], HEADLINE) for name, group in evaluation["groups"].items()}
    page = render(
        "report.html.j2",
        "report.js",
        evaluation=evaluation,
        said=ANSWERS,
        headline=figure_rows(found, HEADLINE),
        others=figure_rows(found, [name for name in _BY_NAME if name not in HEADLINE]),
        groups=groups,
        changes=words,
        cards=note_cards(rows, measured, set(evaluation["answers"]), version),
        n_notes=len(rows),
    )
    write_atomic(path, page)


def write_csv(path: Path, rows: Mapping[int, Row], measured: Mapping[str, Mapping[int, Measured]]) -> None:
    """evaluation.csv: a row for each note and system, with its measures; no text."""
    lines = [csv_row(["id", "row", "system", *_BY_NAME])]
    for number, row in rows.items():
        for system, summaries in measured.items():
            sums = [summaries[number].sums.get(name, (0, 0)) for name in _BY_NAME]
            values = [f"{a / b:.4f}" if b else "" for a, b in sums]
            lines.append(csv_row([row.name, row.number, system, *values]))
    write_atomic(path, "".join(lines))
