"""The report as one HTML file that opens from disk without network, and the figures as a CSV."""

import base64
import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sft.data.rows import Row
from sft.evaluation.figures import changes
from sft.evaluation.measures import HEADLINE, MEASURES, Measure, Measured
from sft.files import write_atomic
from sft.grounding import Finding
from sft.grounding.sentences import sentence_spans
from sft.inference.results import csv_row

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


# ------------------------------------------------------------------------------- figures in words


def shown(measure: Measure, figure: Mapping | None, part: str = "value") -> str:
    """ "12.5" for a share of .125; "–" for what is not there."""
    value = None if figure is None else figure[part]
    return "–" if value is None else f"{value * measure.scale:.{2 if measure.scale == 1 else 1}f}"


def change_in_words(found: Mapping[str, dict], system: str, name: str) -> str:
    """ "Coverage, %: 61.0, in the base 52.3 (difference 8.7, 3.1 to 14.0)"."""
    measure = _BY_NAME[name]
    figure = found[system][name]
    minus = figure["minus"]["base"]
    base = shown(measure, found["base"][name])
    bounds = f"{shown(measure, minus, 'low')} to {shown(measure, minus, 'high')}"
    return f"{measure.title}: {shown(measure, figure)}, base {base} (difference {shown(measure, minus)}, {bounds})"


def figure_rows(found: Mapping[str, dict], names: Sequence[str]) -> list[dict]:
    """The rows of a table of measures: for each system the value, its interval, and where a small chart draws
    them, on one scale (0 to 100) for the whole row."""
    rows = []
    for measure in (_BY_NAME[name] for name in names):
        figures = [found[system].get(measure.name) for system in found]
        ends = [f[end] for f in figures if f for end in ("value", "low", "high") if f[end] is not None]
        if not ends:
            continue
        lowest, span = min(ends), (max(ends) - min(ends)) or 1
        cells = []
        for system, figure in zip(found, figures):
            cell = {"system": system, "value": shown(measure, figure), "interval": "", "chart": None}
            if figure and figure["low"] is not None:
                low, high = (shown(measure, figure, end) for end in ("low", "high"))
                bound = f"at least {low}" if figure["value"] else f"at most {high}"
                cell["interval"] = bound if figure.get("is_bound") else f"{low} to {high}"
                places = (figure[end] - lowest for end in ("low", "value", "high"))
                cell["chart"] = [round(4 + 92 * place / span, 1) for place in places]
            better, worse = changes(found, system)
            cell["change"] = "better" if measure.name in better else "worse" if measure.name in worse else ""
            cells.append(cell)
        rows.append({"title": measure.title, "explanation": measure.explanation, "cells": cells})
    return rows


# ------------------------------------------------------------------------------- notes


def describe(finding: Finding, starts: Sequence[int]) -> str:
    """A finding in plain words; `starts`: of the note's sentences."""
    if finding.note_says is None:
        return f"{finding.kind}: says “{finding.says}”; the note does not"
    place = f" (S{bisect_right(starts, finding.note_start)})" if finding.note_start is not None else ""
    return f"{finding.kind}: says “{finding.says}”; the note says “{finding.note_says}”{place}"


def _describe_all(findings: Sequence[Finding], starts: Sequence[int]) -> list[str]:
    counts = Counter(describe(finding, starts) for finding in findings)
    return [words if n == 1 else f"{words} ({n} times)" for words, n in counts.items()]


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


def note_cards(
    rows: Mapping[int, Row], measured: Mapping[str, Mapping[int, Measured]], trained: set[str]
) -> list[dict]:
    """What the page shows of each note, those on which a `trained` system fails first if there are too
    many."""
    cards = []
    for place, (number, row) in enumerate(rows.items()):
        spans = sentence_spans(row.clinical_note)
        starts = [start for start, _ in spans]
        summaries = []
        for system, ones in measured.items():
            one = ones[number]
            summaries.append(
                {
                    "system": system,
                    "sentences": _sentences(one),
                    "findings": _describe_all(one.check.findings, starts),
                    "state": [name for name in ("empty", "repeats", "cut") if one.sums[name][0]],
                    "fails": one.fails,
                }
            )
        cards.append(
            {
                "place": place,
                "name": row.name,
                "n_words": len(row.clinical_note.split()),
                "sentences": [row.clinical_note[start:end] for start, end in spans],
                "summaries": summaries,
                "fails": [summary["system"] for summary in summaries if summary["fails"]],
                "n_findings": sum(len(s["findings"]) for s in summaries if s["system"] in trained),
            }
        )
    chosen = sorted(cards, key=lambda card: not trained & set(card["fails"]))[:_MOST_NOTES]
    return sorted(chosen, key=lambda card: card["place"])


# ------------------------------------------------------------------------------- files


def write_report(
    path: Path, rows: Mapping[int, Row], measured: Mapping, evaluation: Mapping, systems: Mapping[str, str]
) -> None:
    """report.html. `evaluation`: what evaluation.json holds; `systems`: {name: what it is}."""
    found = evaluation["figures"]
    words = {
        system: {
            kind: [change_in_words(found, system, name) for name in names] for kind, names in lists.items()
        }
        for system, lists in evaluation["changes"].items()
        if "base" in found
    }
    page = render(
        "report.html.j2",
        "report.js",
        evaluation=evaluation,
        said=ANSWERS,
        systems=systems,
        headline=figure_rows(found, HEADLINE),
        others=figure_rows(found, [measure.name for measure in MEASURES if measure.name not in HEADLINE]),
        groups={
            name: figure_rows(group["figures"], HEADLINE) for name, group in evaluation["groups"].items()
        },
        changes=words,
        cards=note_cards(rows, measured, set(evaluation["answers"])),
        n_notes=len(rows),
    )
    write_atomic(path, page)


def write_csv(path: Path, rows: Mapping[int, Row], measured: Mapping[str, Mapping[int, Measured]]) -> None:
    """evaluation.csv: a row for each note and system, with its measures; no text."""
    lines = [csv_row(["id", "row", "system", *(measure.name for measure in MEASURES)])]
    for number, row in rows.items():
        for system, summaries in measured.items():
            sums = [summaries[number].sums.get(measure.name, (0, 0)) for measure in MEASURES]
            values = [f"{a / b:.4f}" if b else "" for a, b in sums]
            lines.append(csv_row([row.name, row.number, system, *values]))
    write_atomic(path, "".join(lines))
