"""From measured summaries to figures with intervals, comparisons and answers: numbers alone, no text.

Every measure is a ratio of two sums over notes: findings per sentence, words copied per word; a mean is a sum
per note. Intervals draw whole notes again, because the sentences of one note are not independent."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sft.data.rows import Row
from sft.evaluation.measures import MEASURES, Measured
from sft.grounding import check_summary

# What the four questions ask for; written in the guide and the report
MOST_FAILED = 0.05  # of the summaries: cut, repeating or empty
LEAST_FORMAT = 0.95
MOST_FLAGGED = 0.10  # of the rewritten sentences, above the reference's
MOST_INVENTED = 0.05  # findings a rewritten sentence, above the reference's
LEAST_COVERAGE = 0.5  # where no chosen sentences say what the note's own words would cover
MOST_UNCOVERED = 0.05  # of the facts, below what chosen sentences of the note cover


def ratios(sums: np.ndarray) -> np.ndarray:
    """(..., 2) numerators and denominators -> (...); NaN where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def resample(table: np.ndarray) -> np.ndarray:
    """(notes, ..., 2) sums of each note -> (2000, ...) ratios, each over as many notes drawn with
    replacement. The same draw serves the whole table, so that differences within it are paired."""
    n_notes = len(table)
    generator = np.random.default_rng(0)
    # In blocks, which bounds memory
    counts = (generator.multinomial(n_notes, np.full(n_notes, 1 / n_notes), size=100) for _ in range(20))
    sums = np.concatenate([block @ table.reshape(n_notes, -1) for block in counts])
    return ratios(sums.reshape(-1, *table.shape[1:]))


def figure_of(value: float, samples: np.ndarray) -> dict:
    """{"value", "low", "high"} with the middle 95 % of resampled values (percentile bootstrap: Efron and
    Tibshirani 1993, chapter 13); no bounds if more than a tenth of the resamples have no value."""
    low = high = None
    if np.isfinite(samples).mean() >= 0.9:
        low, high = map(float, np.nanquantile(samples, [0.025, 0.975]))
    return {"value": float(value), "low": low, "high": high}


def mean_over_notes(values: Iterable[tuple[int | bytes, float]]) -> dict:
    """{"count", "n", "value", "low", "high"}: the mean of (note, value), with its interval over notes."""
    notes: dict[int | bytes, np.ndarray] = {}
    for note, value in values:
        notes[note] = notes.get(note, np.zeros(2)) + np.array((value, 1))
    if not notes:
        return {"count": 0, "n": 0, "value": None, "low": None, "high": None}
    table = np.array(list(notes.values()))
    count, n = table.sum(axis=0)
    return {"count": int(count), "n": int(n), **figure_of(count / n, resample(table))}


def auroc(scores: Sequence[float], others: Sequence[float]) -> float:
    """The chance that one of `scores` is above one of `others`, ties counting half."""
    ordered = np.sort(np.asarray(others, dtype=float))
    places = [np.searchsorted(ordered, scores, side=side) for side in ("left", "right")]
    return float(np.mean(places) / len(ordered))


def sums_table(measured: Mapping[str, Mapping[int, Measured]], numbers: Sequence[int]) -> np.ndarray:
    """(notes, systems, measures, 2): the numerators and denominators of `numbers`."""
    systems = measured.values()
    sums = [[[ones[n].sums.get(m.name, (0, 0)) for m in MEASURES] for ones in systems] for n in numbers]
    return np.array(sums, dtype=float)


def compared_with(system: str, systems: Sequence[str]) -> dict[str, str]:
    """{"base", "reference" and "chosen": the system that a system is compared with, if it is there}; chosen
    are sentences of the note, by the same adapter if there are several."""
    adapter = system.partition("_")[2]
    found = {name: name for name in ("base", "reference") if name in systems}
    chosen = [name for name in (f"quote_{adapter}", "quote", "selected") if name in systems]
    found |= {"chosen": chosen[0]} if chosen else {}
    return {role: other for role, other in found.items() if other != system}


def figures(table: np.ndarray, systems: Sequence[str]) -> dict[str, dict[str, dict]]:
    """{system: {measure: {"value", "low", "high", "n", and "minus": {"base": {"value", "low", "high"}}}}}
    with 95 % intervals; where a share is 0 or 1, one end is the rule of three's. Measures that no note has
    are left out."""
    sums = table.sum(axis=0)
    values = ratios(sums)
    samples = resample(table)
    found: dict[str, dict[str, dict]] = {system: {} for system in systems}
    for s, m in np.argwhere(sums[..., 1] > 0):
        count, n = map(float, sums[s, m])
        figure = figure_of(values[s, m], samples[:, s, m]) | {"n": n}
        is_share = MEASURES[m].scale == 100 and (table[:, s, m, 0] <= table[:, s, m, 1]).all()
        if is_share and count in (0, n):
            bound = min(1.0, 3 / n)
            low, high = (1 - bound, 1.0) if count else (0.0, bound)
            figure |= {"low": low, "high": high, "is_bound": True}
        others = {r: systems.index(other) for r, other in compared_with(systems[s], systems).items()}
        figure["minus"] = {}
        for role, o in others.items():
            if sums[o, m, 1]:
                minus = figure_of(values[s, m] - values[o, m], samples[:, s, m] - samples[:, o, m])
                # Where nothing was counted, resampling finds no spread
                if "is_bound" in figure and minus["low"] is not None:
                    minus["low"] = min(minus["low"], figure["low"] - float(values[o, m]))
                    minus["high"] = max(minus["high"], figure["high"] - float(values[o, m]))
                figure["minus"][role] = minus
        found[systems[s]][MEASURES[m].name] = figure
    return found


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
    hallucination and "all": {"n", "value" (share, ties half), "low", "high", "auroc"}."""
    factual = {row.note_key: row for row in rows if row.label == "factual"}
    pairs: dict[str, list[tuple[bytes, float, float]]] = {}
    for row in rows:
        if row.label == "hallucinated" and row.note_key in factual:
            summaries = (row.model_summary, factual[row.note_key].model_summary)
            risks = [check_summary(row.clinical_note, summary).risk for summary in summaries]
            for kind in ("all", row.hallucination_type or "unnamed"):
                pairs.setdefault(kind, []).append((row.note_key, *risks))
    found = {}
    for kind in sorted(pairs):
        keys, false, true = zip(*pairs[kind])
        ranked = ((a > b) + (a == b) / 2 for a, b in zip(false, true))
        found[kind] = {**mean_over_notes(zip(keys, ranked)), "auroc": auroc(false, true)}
    return found


def _within(figure: dict | None, least: float = -math.inf, most: float = math.inf) -> bool | None:
    """True if the whole interval lies between the bounds, None if only the value does."""
    if figure is None:
        return None
    if not least <= figure["value"] <= most:
        return False
    is_sure = figure["low"] is not None and least <= figure["low"] and figure["high"] <= most
    return is_sure or None


def _shown(figure: dict | None, scale: int = 100) -> str:
    """ "-12.5 (-20 to -5.1)"."""
    if figure is None:
        return "not measured"
    value, low, high = (f"{(figure[end] or 0) * scale:.3g}" for end in ("value", "low", "high"))
    return value if figure["low"] is None else f"{value} ({low} to {high})"


def answer_questions(found: Mapping[str, dict], system: str) -> list[dict]:
    """The four questions before Stage B, for one system, each with `passed`: whether the whole interval lies
    within the threshold; None if only the value does, or if it was not measured."""
    of = found[system]

    def minus(measure: str, role: str) -> dict | None:
        return of.get(measure, {}).get("minus", {}).get(role)

    loss = minus("loss", "base")
    # A handful of notes cannot bound a rare failure: the values decide
    failed = {name: of[name]["value"] for name in ("cut", "repeats", "empty")}
    kept = of.get("format")
    is_formed = max(failed.values()) <= MOST_FAILED and (not kept or kept["value"] >= LEAST_FORMAT)
    shares = ", ".join(f"{name} {value:.0%}" for name, value in failed.items())
    copies = "flagged" in of and "rewritten" not in of
    flagged, invented = minus("rewritten", "reference"), minus("invented", "reference")
    own = "no sentence is rewritten" if copies else "per 100 rewritten sentences, minus the reference's: {}"
    coverage, least = minus("coverage", "chosen"), -MOST_UNCOVERED
    covers = f"coverage, minus that of the note's own sentences: {_shown(coverage)} %"
    asked = f"at most {MOST_UNCOVERED * 100:.0f} points below it"
    if not coverage:
        coverage, least = of.get("coverage"), LEAST_COVERAGE
        covers = f"coverage: {_shown(coverage)} %"
        asked = f"at least {LEAST_COVERAGE:.0%}"
    accurate = [copies or _within(flagged, most=MOST_FLAGGED), _within(coverage, least=least)]
    larger = "use a larger base model, more rows or all linear layers; or the note's own sentences (--writing quote)"
    answers = [
        ("Does it know the terminology?", _within(loss, most=-1e-9),
         f"loss per token, minus the base's: {_shown(loss, 1)} nats", "below 0, with the whole interval",
         "train on more rows or epochs, or on a base model that knows clinical text"),
        ("Does it keep the output format?", is_formed,
         f"{shares}; " + (f"{_shown(kept)} % of the marks kept" if kept else "free text, without marks"),
         f"each at most {MOST_FAILED:.0%}; marks at least {LEAST_FORMAT:.0%}",
         "raise --max_new_tokens if summaries are cut; else train for more epochs or on more rows"),
        ("Does it reflect the notes accurately?", False if False in accurate else None if None in accurate else True,
         f"sentences with a finding, {own.format(_shown(flagged))}; {covers}",
         f"at most {MOST_FLAGGED * 100:.0f} more; coverage {asked}", larger),
        ("Is it free of hallucinations?", copies or _within(invented, most=MOST_INVENTED),
         f"words, numbers and drugs that the note lacks, {own.format(_shown(invented))}",
         f"at most {MOST_INVENTED * 100:.0f} more", larger),
    ]  # fmt: skip
    return [dict(zip(("question", "passed", "figure", "threshold", "advice"), answer)) for answer in answers]


def verdict(answers: Sequence[Mapping]) -> str:
    failed = [answer for answer in answers if answer["passed"] is False]
    if failed:
        return f"Do not go on to Stage B yet: {failed[-1]['advice']}."
    if any(answer["passed"] is None for answer in answers):
        return "Not shown yet: evaluate more rows, with all systems, before going on."
    return "Go on to Stage B, once a blind reading (--blind_sheet) has confirmed it: the check does not see every error."
