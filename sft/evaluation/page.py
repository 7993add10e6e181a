"""The report as one HTML file that opens from disk without network, and the figures as a CSV."""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sft.data.rows import Row
from sft.evaluation.figures import changes, in_words, shown
from sft.evaluation.measures import HEADLINE, MEASURES, Measured, Sentence
from sft.files import write_atomic
from sft.grounding.sentences import split_sentences
from sft.inference.results import csv_row, describe_finding

ANSWERS = {True: "yes", False: "no", None: "not shown"}
_MOST_NOTES = 300  # on the page, failures first: a browser has to hold them


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


def figure_rows(found: Mapping[str, dict], names: Sequence[str]) -> list[dict]:
    """The rows of a table of measures: for each system the value, its interval, and where a small chart draws
    them, on one scale (0 to 100) for the whole row."""
    rows = []
    moved = {system: changes(found, system) for system in found}
    for measure in (MEASURES[name] for name in names):
        figures = {system: found[system].get(measure.name) for system in found}
        drawn = [figure for figure in figures.values() if figure]
        ends = [f[end] for f in drawn for end in ("value", "low", "high") if f[end] is not None]
        cells = []
        for system, figure in figures.items():
            change = "".join(kind for kind, names in moved[system].items() if measure.name in names)
            cell = {"system": system, "value": shown(measure, figure), "change": change, "chart": None}
            if figure and figure["low"] is not None:
                low, high = (shown(measure, figure, end) for end in ("low", "high"))
                bound = f"at least {low}" if figure["value"] else f"at most {high}"
                cell["interval"] = bound if figure.get("is_bound") else f"{low} to {high}"
                places = (figure[end] - min(ends) for end in ("low", "value", "high"))
                cell["chart"] = [round(4 + 92 * p / (max(ends) - min(ends) or 1), 1) for p in places]
            cells.append(cell)
        if ends:
            rows.append({"title": measure.title, "explanation": measure.explanation, "cells": cells})
    return rows


def _pieces(summary: str, sentence: Sentence) -> list[tuple[str, str]]:
    """A sentence cut into (text, kind of finding or "")."""
    pieces = []
    position = sentence.start
    for finding in sorted(sentence.findings, key=lambda finding: finding["start"]):
        if finding["start"] >= position:
            pieces.append((summary[position : finding["start"]], ""))
            pieces.append((summary[finding["start"] : finding["end"]], finding["kind"]))
            position = finding["end"]
    return [*pieces, (summary[position : sentence.end], "")]


def _summary(system: str, one: Measured) -> dict:
    """What a card shows of one system's summary; findings that are the same stand once."""
    text = one.result["generated_summary"]
    likelihoods = one.result.get("model_support") or [None] * len(one.sentences)
    counts = Counter(f"{finding['kind']}: {describe_finding(finding)}" for finding in one.result["findings"])
    return {
        "system": system,
        "sentences": [
            {"pieces": _pieces(text, sentence), "support": sentence.support, "flagged": bool(sentence.findings),
             "model": pair and f"{pair[0] - pair[1]:+.1f}"}
            for sentence, pair in zip(one.sentences, likelihoods)
        ],
        "findings": [words if n == 1 else f"{words} ({n} times)" for words, n in counts.items()],
        "states": [fault for fault in one.faults if fault != "flagged"],
    }  # fmt: skip


def note_cards(rows: Mapping[int, Row], measured: Mapping, trained: set[str], version: int) -> list[dict]:
    """What the page shows of each note, those on which a `trained` system fails first if there are too
    many."""
    fails = {number: [system for system, ones in measured.items() if ones[number].faults] for number in rows}
    chosen = sorted(rows, key=lambda number: not trained & set(fails[number]))[:_MOST_NOTES]
    cards = []
    for number in sorted(chosen):
        note, name = rows[number].clinical_note, rows[number].name
        summaries = [_summary(system, ones[number]) for system, ones in measured.items()]
        n_findings = sum(len(one["findings"]) for one in summaries if one["system"] in trained)
        card = {"place": number, "name": name, "n_words": len(note.split()), "n_findings": n_findings}
        card |= {"sentences": split_sentences(note, version), "summaries": summaries, "fails": fails[number]}
        cards.append(card)
    return cards


def write_report(path: Path, rows: Mapping, measured: Mapping, evaluation: Mapping, version: int) -> None:
    """report.html. `evaluation`: what evaluation.json holds; `version`: of the notes' sentence numbers."""
    found = evaluation["figures"]
    words = {
        system: {kind: [in_words(n, found[system][n]["minus"]["base"], "base") for n in names] for kind, names in of.items()}
        for system, of in evaluation["changes"].items()
        if "base" in found
    }  # fmt: skip
    page = render(
        "report.html.j2",
        "report.js",
        evaluation=evaluation,
        said=ANSWERS,
        headline=figure_rows(found, HEADLINE),
        others=figure_rows(found, [name for name in MEASURES if name not in HEADLINE]),
        groups={name: figure_rows(of["figures"], HEADLINE) for name, of in evaluation["groups"].items()},
        changes=words,
        cards=note_cards(rows, measured, set(evaluation["answers"]), version),
        n_notes=len(rows),
    )
    write_atomic(path, page)


def write_csv(path: Path, rows: Mapping[int, Row], measured: Mapping[str, Mapping[int, Measured]]) -> None:
    """evaluation.csv: a row for each note and system, with its measures; no text."""
    lines = [csv_row(["id", "row", "system", *MEASURES])]
    for number, row in rows.items():
        for system, summaries in measured.items():
            sums = [summaries[number].sums[name] for name in MEASURES]
            values = [f"{a / b:.4f}" if b else "" for a, b in sums]
            lines.append(csv_row([row.name, row.number, system, *values]))
    write_atomic(path, "".join(lines))
