"""From measured summaries to figures with intervals, comparisons and answers: numbers alone, no text.

Every measure is a ratio of two sums over notes: findings per sentence, words copied per word; a mean is a sum
per note. Intervals draw whole notes again, because the sentences of one note are not independent."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sft.data.rows import Row
from sft.evaluation.measures import MEASURES, Measure, Measured
from sft.grounding import check_summary


def resample(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(notes, ..., 2) numerators and denominators of each note -> ((...) the ratio of their sums, (2000, ...)
    the same over as many notes drawn with replacement); NaN where there is nothing to divide by. The same
    draw serves the whole table, so that differences within it are paired."""
    n_notes = len(table)
    generator = np.random.default_rng(0)
    # In blocks, which bounds memory
    counts = (generator.multinomial(n_notes, np.full(n_notes, 1 / n_notes), size=100) for _ in range(20))
    blocks = itertools.chain([np.ones((1, n_notes))], counts)
    sums = np.concatenate([block @ table.reshape(n_notes, -1) for block in blocks])
    sums = sums.reshape(-1, *table.shape[1:])
    with np.errstate(invalid="ignore"):
        ratios = sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], np.nan)
    return ratios[0], ratios[1:]


def figure_of(value: float, samples: np.ndarray) -> dict:
    """{"value", "low", "high"} with the middle 95 % of resampled values (percentile bootstrap: Efron and
    Tibshirani 1993, chapter 13); no bounds if more than a tenth of the resamples have no value."""
    low = high = None
    if np.isfinite(samples).mean() >= 0.9:
        low, high = map(float, np.nanquantile(samples, [0.025, 0.975]))
    return {"value": float(value), "low": low, "high": high}


def mean_over_notes(values: Iterable[tuple[int | bytes, float]]) -> dict:
    """{"count", "n", "value", "low", "high"}: the mean of (note, value), with its interval over notes."""
    notes: dict[int | bytes, list[float]] = {}
    for note, value in values:
        notes.setdefault(note, []).append(value)
    if not notes:
        return {"count": 0, "n": 0, "value": None, "low": None, "high": None}
    table = np.array([(sum(of_note), len(of_note)) for of_note in notes.values()], dtype=float)
    count, n = map(int, table.sum(axis=0))
    return {"count": count, "n": n, **figure_of(*resample(table))}


def auroc(scores: Sequence[float], others: Sequence[float]) -> float:
    """The chance that one of `scores` is above one of `others`, ties counting half."""
    ordered = np.sort(np.asarray(others, dtype=float))
    places = [np.searchsorted(ordered, scores, side=side) for side in ("left", "right")]
    return float(np.mean(places) / len(ordered))


def compared_with(system: str, systems: Sequence[str]) -> dict[str, str]:
    """{"base", "reference" and "chosen": the system that a system is compared with, if it is there}; chosen
    are sentences of the note, by the same adapter if there are several."""
    adapter = system.partition("_")[2]
    roles = {name: [name] for name in ("base", "reference")}
    roles["chosen"] = [f"quote_{adapter}", "quote", "selected"]
    found = {role: next((name for name in names if name in systems), system) for role, names in roles.items()}
    return {role: other for role, other in found.items() if other != system}


def figures(measured: Mapping[str, Mapping[int, Measured]], notes: Sequence[int]) -> dict[str, dict]:
    """{system: {measure: {"value", "low", "high", "n", and "minus": {"base": {"value", "low", "high"}}}}}
    with 95 % intervals; where a share is 0 or 1, one end is the rule of three's. Measures that no note has
    are left out."""
    systems = list(measured)
    by_note = ([ones[note].sums for ones in measured.values()] for note in notes)
    sums = [[[of[name] for name in MEASURES] for of in of_note] for of_note in by_note]
    table = np.array(sums, dtype=float)  # (notes, systems, measures, 2)
    sums = table.sum(axis=0)
    values, samples = resample(table)
    found: dict[str, dict[str, dict]] = {system: {} for system in systems}
    for s, m in np.argwhere(sums[..., 1] > 0):
        name = list(MEASURES)[m]
        count, n = map(float, sums[s, m])
        figure = figure_of(values[s, m], samples[:, s, m]) | {"n": n, "minus": {}}
        is_share = MEASURES[name].scale == 100 and (table[:, s, m, 0] <= table[:, s, m, 1]).all()
        if is_share and count in (0, n):
            bound = min(1.0, 3 / n)
            figure |= {"low": 1 - bound if count else 0.0, "high": 1.0 if count else bound, "is_bound": True}
        for role, other in compared_with(systems[s], systems).items():
            o = systems.index(other)
            if sums[o, m, 1]:
                minus = figure_of(values[s, m] - values[o, m], samples[:, s, m] - samples[:, o, m])
                # Where nothing was counted, resampling finds no spread
                if "is_bound" in figure and minus["low"] is not None:
                    minus["low"] = min(minus["low"], figure["low"] - float(values[o, m]))
                    minus["high"] = max(minus["high"], figure["high"] - float(values[o, m]))
                figure["minus"][role] = minus
        found[systems[s]][name] = figure
    return found


def changes(found: Mapping[str, dict], system: str) -> dict[str, list[str]]:
    """{"better" and "worse": measures whose paired difference to the base has an interval without 0}."""
    lists: dict[str, list[str]] = {"better": [], "worse": []}
    for name, figure in found[system].items():
        minus = figure["minus"].get("base")
        if minus and MEASURES[name].better and minus["low"] is not None and minus["low"] * minus["high"] > 0:
            lists["better" if minus["value"] * MEASURES[name].better > 0 else "worse"].append(name)
    return lists


def twins(rows: Sequence[Row]) -> dict[str, dict]:
    """How well the check ranks a hallucinated summary below a factual one of the same note, by kind of
    hallucination and "all": {"n", "value" (share, ties half), "low", "high", "auroc"}."""
    factual = {row.note_key: row for row in rows if row.label == "factual"}
    pairs: dict[str, list[tuple[bytes, float, float]]] = {}
    for row in rows:
        if row.label == "hallucinated" and row.note_key in factual:
            summaries = (row.model_summary, factual[row.note_key].model_summary)
            risks = [check_summary(row.clinical_note, summary).risk for summary in summaries]
            for kind in {"all", row.hallucination_type or "unnamed"}:
                pairs.setdefault(kind, []).append((row.note_key, *risks))
    found = {}
    for kind in sorted(pairs):
        keys, false, true = zip(*pairs[kind])
        ranked = ((a > b) + (a == b) / 2 for a, b in zip(false, true))
        found[kind] = {**mean_over_notes(zip(keys, ranked)), "auroc": auroc(false, true)}
    return found


# ------------------------------------------------------------------------------- in words


def shown(measure: Measure, figure: Mapping | None, part: str = "value") -> str:
    """ "12.5" for a share of .125; "–" for what is not there."""
    value = None if figure is None else figure[part]
    return "–" if value is None else f"{value * measure.scale:.{2 if measure.scale == 1 else 1}f}"


def in_words(name: str, figure: Mapping | None, role: str = "") -> str:
    """ "ROUGE-1, minus the base's: 0.12 (0.05 to 0.19)"; `role`: of the system that it is a difference to."""
    measure = MEASURES[name]
    minus = f", minus the {'quoted sentences' if role == 'chosen' else role}'s" if role else ""
    words = f"{measure.title}{minus}: {shown(measure, figure)}"
    is_bounded = figure is not None and figure["low"] is not None
    return words + f" ({shown(measure, figure, 'low')} to {shown(measure, figure, 'high')})" * is_bounded


class Bound(NamedTuple):
    """What is asked of a measure, or of its difference to the system in a `role`: that the whole interval is
    on the good side of the limit, or only the value, where a handful of notes cannot bound a rare failure.
    `or_none_where`: a measure; the bound is kept if this one was measured and its own applies to nothing."""

    name: str
    limit: float
    role: str = ""
    by_value: bool = False
    or_none_where: str = ""

    def keeps(self, of: Mapping[str, dict]) -> tuple[bool | None, str]:
        """(whether a system's figures keep it, None if only the value does or it was not measured; the figure
        in words)."""
        measure, figure = MEASURES[self.name], of.get(self.name)
        if figure is None and self.or_none_where in of:
            return True, f"{measure.title}: applies to none"
        figure = figure["minus"].get(self.role) if figure and self.role else figure
        ends = [figure[end] for end in ("value", "low", "high")] if figure else []
        fine = [end is not None and (end - self.limit) * measure.better >= 0 for end in ends]
        is_kept = fine[0] and (self.by_value or all(fine) or None) if fine else None
        return is_kept, in_words(self.name, figure, self.role)

    def __str__(self) -> str:
        return f"{'at least' if MEASURES[self.name].better > 0 else 'at most'} {self.limit * 100:g}"


_FEWEST_NOTES = 20  # that never fail: still up to 3 / 20 might (rule of three)
_LARGER = "use a larger base, more rows or all linear layers; or the note's own sentences (--writing quote)"
_CHOSEN = "no model writes these: read what is left out (--blind_sheet); more training rows teach the choice"
_QUOTED = Bound("coverage", 0.5)  # where no chosen sentences say what the note's own words would cover
QUESTIONS = (
    ("Does it know the terminology?", [Bound("loss", 0, "base")],
     "train on more rows or epochs, or on a base model that knows clinical text"),
    ("Does it keep the output format?",
     [*(Bound(name, 0.05, by_value=True) for name in ("cut", "repeats", "empty")),
      Bound("format", 0.95, by_value=True, or_none_where="cut")],
     "raise --max_new_tokens if summaries are cut; else train for more epochs or on more rows"),
    ("Does it reflect the notes accurately?",
     [Bound("rewritten", 0.10, "reference", or_none_where="flagged"), Bound("coverage", -0.05, "chosen")], _LARGER),
    ("Is it free of hallucinations?", [Bound("invented", 0.05, "reference", or_none_where="flagged")], _LARGER),
)  # fmt: skip


def answer_questions(found: Mapping[str, dict], system: str) -> list[dict]:
    """The four questions before Stage B, for one system, each with `passed`: whether the whole interval lies
    within the threshold; None if only the value does, or if it was not measured."""
    has_quoted = "chosen" in found[system].get("coverage", {}).get("minus", {})
    answers = []
    for question, bounds, advice in QUESTIONS:
        bounds = [_QUOTED if bound.role == "chosen" and not has_quoted else bound for bound in bounds]
        kept, words = zip(*(bound.keeps(found[system]) for bound in bounds))
        passed = False if False in kept else None if None in kept else True
        # Of sentences that no model wrote none can be cut or written better
        is_chosen = found[system].get("own_share", {}).get("value") == 0
        advice = _CHOSEN if is_chosen and question != QUESTIONS[0][0] else advice
        answer = {"question": question, "passed": passed, "figure": "; ".join(words)}
        answers.append(answer | {"threshold": "; ".join(map(str, bounds)), "advice": advice})
    return answers


def verdict(answers: Sequence[Mapping], of: Mapping[str, dict], n_notes: int) -> str:
    """What the answers about a system with these figures, on so many notes, mean for Stage B."""
    own_share = of.get("own_share", {}).get("value")
    if own_share == 0 or ("flagged" in of and "rewritten" not in of):
        return "Nothing is in the model's own words: nothing for Stage B to correct. Judge what is left out (--blind_sheet)."
    failed = [answer for answer in answers if answer["passed"] is False]
    if failed:
        return f"Do not go on to Stage B yet: {failed[-1]['advice']}."
    if n_notes < _FEWEST_NOTES or any(answer["passed"] is None for answer in answers):
        return "Not shown yet: evaluate more rows, with all systems, before going on."
    return "Go on to Stage B, once a blind reading (--blind_sheet) has confirmed it: the check does not see every error."
