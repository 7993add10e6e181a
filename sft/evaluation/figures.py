"""From measured summaries to figures with intervals, comparisons and answers: numbers alone, no text."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sft.data.rows import Row
from sft.evaluation.measures import MEASURES, Measured
from sft.evaluation.statistics import auroc, interval, ratios, resample, rule_of_three
from sft.grounding import check_summary

COMPARED_WITH = ("base", "reference", "selected")
# What the four questions ask for; written in the guide and the report
MOST_FAILED = 0.05  # of the summaries: cut, repeating or empty
LEAST_FORMAT = 0.95
MOST_FLAGGED = 0.10  # of the rewritten sentences, above the reference's
MOST_INVENTED = 0.05  # findings a rewritten sentence, above the reference's
LEAST_COVERAGE = 0.5  # where no training rows say what sentences of the note would cover
MOST_UNCOVERED = 0.05  # of the facts, below what note sentences cover that a selector chose


def sums_table(measured: Mapping[str, Mapping[int, Measured]], numbers: Sequence[int]) -> np.ndarray:
    """(notes, systems, measures, 2): the numerators and denominators of `numbers`."""
    return np.array(
        [
            [[summaries[n].sums.get(m.name, (0, 0)) for m in MEASURES] for summaries in measured.values()]
            for n in numbers
        ],
        dtype=float,
    )


def figures(table: np.ndarray, systems: Sequence[str]) -> dict[str, dict[str, dict]]:
    """{system: {measure: {"value", "low", "high", "n", and "minus": {"base": {"value", "low", "high"}}}}}
    with 95 % intervals; where a share is 0 or 1, one end is the rule of three's. Measures that no note has
    are left out."""
    sums = table.sum(axis=0)
    values = ratios(sums)
    samples = resample(table)
    found: dict[str, dict[str, dict]] = {}
    for s, system in enumerate(systems):
        found[system] = {}
        for m, measure in enumerate(MEASURES):
            if not sums[s, m, 1]:
                continue
            figure = _figure(values[s, m], samples[:, s, m]) | {"n": sums[s, m, 1]}
            is_share = measure.scale == 100 and (table[:, s, m, 0] <= table[:, s, m, 1]).all()
            if is_share and sums[s, m, 0] in (0, sums[s, m, 1]):
                bound = rule_of_three(sums[s, m, 1])
                ends = (0.0, bound) if sums[s, m, 0] == 0 else (1 - bound, 1.0)
                figure |= {"low": ends[0], "high": ends[1], "is_bound": True}
            others = {other: systems.index(other) for other in COMPARED_WITH if other in systems}
            figure["minus"] = {
                other: _figure(values[s, m] - values[o, m], samples[:, s, m] - samples[:, o, m])
                for other, o in others.items()
                if o != s and sums[o, m, 1]
            }
            found[system][measure.name] = figure
    return found


def _figure(value: float, samples: np.ndarray) -> dict:
    low, high = interval(samples) or (None, None)
    return {"value": float(value), "low": low, "high": high}


def changes(found: Mapping[str, dict], system: str) -> tuple[list[str], list[str]]:
    """(what got better than in the base, what got worse): names of the measures whose paired difference has
    an interval without 0."""
    lists: dict[int, list[str]] = {1: [], -1: []}
    for measure in MEASURES:
        minus = found[system].get(measure.name, {}).get("minus", {}).get("base")
        if minus and measure.better and minus["low"] is not None and minus["low"] * minus["high"] > 0:
            lists[int(np.sign(minus["value"])) * measure.better].append(measure.name)
    return lists[1], lists[-1]


def twins(rows: Sequence[Row]) -> dict[str, dict]:
    """How well the check ranks a hallucinated summary below a factual one of the same note, by kind of
    hallucination and "all": {"n", "ranked" (share, ties half) with "low" and "high", "auroc"}."""
    factual = {row.note_key: row for row in rows if row.label == "factual"}
    risks = []
    for row in rows:
        if row.label == "hallucinated" and row.note_key in factual:
            true = check_summary(row.clinical_note, factual[row.note_key].model_summary).risk
            false = check_summary(row.clinical_note, row.model_summary).risk
            risks.append((row.hallucination_type or "unnamed", row.note_key, true, false))
    found = {}
    for kind in ["all", *sorted({risk[0] for risk in risks})] if risks else []:
        chosen = [risk for risk in risks if kind in ("all", risk[0])]
        notes: dict[bytes, list[float]] = {}
        for _, key, true, false in chosen:
            notes.setdefault(key, []).append((false > true) + (false == true) / 2)
        table = np.array([[sum(ranked), len(ranked)] for ranked in notes.values()])
        share = _figure(ratios(table.sum(axis=0)), resample(table))
        area = auroc([risk[3] for risk in chosen], [risk[2] for risk in chosen])
        found[kind] = {"n": len(chosen), **share, "auroc": area}
    return found


# ------------------------------------------------------------------------------- the four questions


class Answer(NamedTuple):
    """`passed`: whether the whole interval lies within the threshold; None if only the value does."""

    question: str
    passed: bool | None
    figure: str
    threshold: str
    advice: str


def answer_questions(found: Mapping[str, dict], system: str) -> list[Answer]:
    """The four questions before Stage B, for one system."""
    of = found[system]
    return [_terminology(of), _format(of), _accuracy(of), _hallucination(of)]


def _within(figure: dict | None, test: Callable[[float], bool], worst: str) -> bool | None:
    """True if the interval's worse end (`worst`: "low" or "high") passes, None if only the value does or
    there is no figure."""
    if figure is None or (test(figure["value"]) and (figure[worst] is None or not test(figure[worst]))):
        return None
    return test(figure["value"])


def _shown(figure: dict | None, scale: int = 100) -> str:
    if figure is None:
        return "not measured"
    if figure["low"] is None:
        return f"{figure['value'] * scale:.3g}"
    return f"{figure['value'] * scale:.3g} ({figure['low'] * scale:.3g} to {figure['high'] * scale:.3g})"


def _all_of(*passed: bool | None) -> bool | None:
    return False if False in passed else None if None in passed else True


def _minus(of: Mapping[str, dict], measure: str, other: str) -> dict | None:
    return of.get(measure, {}).get("minus", {}).get(other)


def _terminology(of: Mapping[str, dict]) -> Answer:
    difference = _minus(of, "loss", "base")
    return Answer(
        "Does it know the terminology?",
        _within(difference, lambda x: x < 0, "high"),
        f"loss per token minus the base's: {_shown(difference, 1)} nats",
        "below 0, with the whole interval",
        "train on more rows or epochs, or on a base model that knows clinical text",
    )


def _format(of: Mapping[str, dict]) -> Answer:
    failed = {name: of.get(name) for name in ("cut", "repeats", "empty")}
    kept = of.get("format")
    # A handful of notes cannot bound a rare failure: the values decide
    passed = [figure is not None and figure["value"] <= MOST_FAILED for figure in failed.values()]
    passed.append(kept is None or kept["value"] >= LEAST_FORMAT)
    shares = ", ".join(f"{name} {figure['value']:.0%}" for name, figure in failed.items() if figure)
    return Answer(
        "Does it keep the output format?",
        all(passed),
        f"{shares}; marks kept: {'free text' if kept is None else _shown(kept)}",
        f"each at most {MOST_FAILED:.0%}; marks at least {LEAST_FORMAT:.0%}",
        "raise --max_new_tokens if summaries are cut; else train for more epochs or on more rows",
    )


def _accuracy(of: Mapping[str, dict]) -> Answer:
    flagged = _minus(of, "rewritten", "reference")
    coverage, least = of.get("coverage"), LEAST_COVERAGE
    threshold = f"coverage at least {LEAST_COVERAGE:.0%}"
    if beside := _minus(of, "coverage", "selected"):
        coverage, least = beside, -MOST_UNCOVERED
        threshold = f"coverage at most {MOST_UNCOVERED:.0%} below that of the note's own, selected sentences"
    return Answer(
        "Does it reflect the notes accurately?",
        _all_of(
            _within(flagged, lambda x: x <= MOST_FLAGGED, "high"),
            _within(coverage, lambda x: x >= least, "low"),
        ),
        f"rewritten sentences with a finding per 100, minus the reference's: {_shown(flagged)}; coverage"
        f"{', minus that of selected sentences' if beside else ''}: {_shown(coverage)}",
        f"at most {MOST_FLAGGED * 100:.0f} more per 100; {threshold}",
        "use a larger base model or another recipe (all linear layers, more rows), or the note's own sentences",
    )


def _hallucination(of: Mapping[str, dict]) -> Answer:
    invented = _minus(of, "invented", "reference")
    return Answer(
        "Is it free of hallucinations?",
        _within(invented, lambda x: x <= MOST_INVENTED, "high"),
        f"words, numbers and drugs that the note lacks, per 100 rewritten sentences, minus the reference's: {_shown(invented)}",
        f"at most {MOST_INVENTED * 100:.0f} more per 100",
        "use a larger base model, more rows, or the note's own sentences",
    )


def verdict(answers: Sequence[Answer]) -> str:
    failed = [answer for answer in answers if answer.passed is False]
    if failed:
        return f"Do not go on to Stage B yet: {failed[-1].advice}."
    if any(answer.passed is None for answer in answers):
        return "Not shown: the intervals reach beyond the thresholds. Evaluate more rows before going on."
    return "Go on to Stage B, once a blind reading (--blind_sheet) has confirmed it: the check does not see every error."
