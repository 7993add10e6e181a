"""Notes that are nearly the same: another name or date, sentences in another order, some in other words.

Two notes are as alike as the share of word pairs that they have in common (Jaccard). MinHash estimates it,
and locality-sensitive hashing finds the pairs, so that time grows with the number of notes, not with its
square (Broder 1997; Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3).
"""

import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MIN_ALIKE = 0.36  # unrelated notes of the same kind reach 0.31
MIN_ALIKE_SHORT = 0.55  # short dialogues are made of the same questions
SHORT_NOTE = 30  # words
_N_BANDS = 42
_N_ROWS = 3  # per band: finds 94 of 100 pairs that are 0.4 alike, and nearly all above 0.5
_NOTES_PER_PART = 1000
_PAIRS_PER_PART = 100_000
_WORD = re.compile(r"\w+")


def similar_notes(notes: Sequence[str], n_known: int = 0) -> list[tuple[int, int, float]]:
    """(note, an earlier one that it is like, how alike from 0 to 1), by index, at most once per note.

    With `n_known`, later notes are compared with the first `n_known` only. Deterministic.
    """
    import numpy as np

    if len(notes) < 2:
        return []
    signatures, n_words = _signatures(notes)
    pairs = np.unique(np.concatenate(list(_candidates(signatures, n_known))), axis=0)
    alike = np.empty(len(pairs))
    for start in range(0, len(pairs), _PAIRS_PER_PART):
        part = slice(start, start + _PAIRS_PER_PART)
        one, other = pairs[part].T
        alike[part] = (signatures[one] == signatures[other]).mean(1)
    is_short = n_words[pairs].min(1) < SHORT_NOTE
    enough = alike >= np.where(is_short, MIN_ALIKE_SHORT, MIN_ALIKE)
    best = {}
    for (note, known), share in zip(pairs[enough].tolist(), alike[enough].tolist()):
        best[note] = max(best.get(note, (0.0, 0)), (share, known))
    return [(note, known, share) for note, (share, known) in best.items()]


def groups_of_similar(notes: Sequence[str]) -> list[int]:
    """A group's number for each note: notes that are alike, also through others, are in the same one."""
    group = list(range(len(notes)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    # Every note is linked to one that it is like, so a chain of links holds a group together
    for note, known, _ in similar_notes(notes):
        group[root(note)] = root(known)
    return [root(i) for i in range(len(notes))]


def _signatures(notes: Sequence[str]) -> "tuple[np.ndarray, np.ndarray]":
    """(uint32 (n_notes, 126): the least value of each of 126 hash functions over a note's word pairs;
    the numbers of words)."""
    import numpy as np

    class Codes(dict):
        def __missing__(self, word: str) -> int:
            code = self[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
            return code

    codes = Codes()
    dice = np.random.default_rng(1)
    factors = dice.integers(0, 2**32, _N_BANDS * _N_ROWS, dtype=np.uint32) | 1
    signatures = np.empty((len(notes), len(factors)), np.uint32)
    n_words = np.empty(len(notes), np.int64)
    for start in range(0, len(notes), _NOTES_PER_PART):
        part = notes[start : start + _NOTES_PER_PART]
        # A word at either end, so that no note is without a pair
        words = [[1, *map(codes.__getitem__, _WORD.findall(note.casefold())), 2] for note in part]
        sizes = np.array([len(codes_of_note) for codes_of_note in words])
        n_words[start : start + len(part)] = sizes - 2
        flat = np.concatenate([np.array(codes_of_note, np.uint32) for codes_of_note in words])
        pairs = (flat[:-1] * np.uint32(0x9E3779B1)) ^ (flat[1:] * np.uint32(0x85EBCA77))
        pairs ^= pairs >> np.uint32(15)
        ends = np.cumsum(sizes)
        pairs = np.delete(pairs, ends[:-1] - 1)  # those from one note to the next
        starts = np.concatenate([[0], (ends - np.arange(1, len(ends) + 1))[:-1]])
        for i, factor in enumerate(factors):
            mixed = pairs * factor
            mixed ^= mixed >> np.uint32(16)  # else the 126 functions are too much like each other
            signatures[start : start + len(part), i] = np.minimum.reduceat(mixed * factors[i - 1], starts)
    return signatures, n_words


def _candidates(signatures: "np.ndarray", n_known: int):
    """Arrays (n_pairs, 2) of (note, earlier note) that agree in a whole band: each with the first and the
    last before it, so that a thousand copies of one note make no million pairs."""
    import numpy as np

    yield np.empty((0, 2), np.int64)
    for band in range(_N_BANDS):
        part = signatures[:, band * _N_ROWS : (band + 1) * _N_ROWS].astype(np.uint64)
        keys = part[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ part[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F)
        keys = keys * np.uint64(3) ^ part[:, 2]
        order = np.argsort(keys, kind="stable")
        is_first = np.concatenate([[True], keys[order][1:] != keys[order][:-1]])
        positions = np.arange(len(order))
        first = np.maximum.accumulate(np.where(is_first, positions, 0))
        if n_known:
            is_known = order < n_known
            last = np.maximum.accumulate(np.where(is_known, positions, 0))
            keep = ~is_known & is_known[first]
        else:
            last = positions - 1
            keep = ~is_first
        for earlier in (first, last):
            yield np.stack([order[keep], order[earlier[keep]]], 1)
