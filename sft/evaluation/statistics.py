"""Intervals over notes, ranks and agreement.

Every measure is a ratio of two sums over notes: findings per sentence, words copied per word; a mean is a sum
per note. Notes are drawn again with replacement, because the sentences of one note are not independent.
"""

from collections.abc import Sequence

import numpy as np

N_RESAMPLES = 2000
_PER_BLOCK = 100  # resamples computed together: bounds memory


def ratios(sums: np.ndarray) -> np.ndarray:
    """(..., 2) numerators and denominators -> (...); NaN where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def resample(table: np.ndarray, n_resamples: int = N_RESAMPLES, seed: int = 0) -> np.ndarray:
    """(notes, ..., 2) sums of each note -> (n_resamples, ...) ratios, each over as many notes drawn with
    replacement. The same draw serves the whole table, so that differences within it are paired."""
    n_notes = len(table)
    generator = np.random.default_rng(seed)
    flat = table.reshape(n_notes, -1)
    blocks = []
    for start in range(0, n_resamples, _PER_BLOCK):
        size = min(_PER_BLOCK, n_resamples - start)
        counts = generator.multinomial(n_notes, np.full(n_notes, 1 / n_notes), size=size)
        blocks.append(counts @ flat)
    return ratios(np.concatenate(blocks).reshape(n_resamples, *table.shape[1:]))


def interval(samples: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of resampled values (percentile bootstrap: Efron and Tibshirani 1993, chapter 13); None
    if more than a tenth of the resamples have no value."""
    samples = samples[np.isfinite(samples)] if np.isfinite(samples).mean() >= 0.9 else samples[:0]
    if len(samples) == 0:
        return None
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def rule_of_three(n: float) -> float:
    """The upper end of a 95 % interval for a share that was 0 in `n` cases."""
    return min(1.0, 3 / n) if n else 1.0


def auroc(scores: Sequence[float], others: Sequence[float]) -> float | None:
    """The chance that one of `scores` is above one of `others`, ties counting half; None without both."""
    if not len(scores) or not len(others):
        return None
    ordered = np.sort(np.asarray(others, dtype=float))
    below = np.searchsorted(ordered, scores, side="left")
    not_above = np.searchsorted(ordered, scores, side="right")
    return float((below + not_above).mean() / 2 / len(ordered))


def kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's kappa of two readers' yes and no: agreement beyond chance (1960); None where chance alone
    agrees."""
    pairs = np.array([first, second], dtype=float)
    if pairs.size == 0:
        return None
    observed = (pairs[0] == pairs[1]).mean()
    yes = pairs.mean(axis=1)
    expected = yes.prod() + (1 - yes).prod()
    return None if expected == 1 else float((observed - expected) / (1 - expected))
