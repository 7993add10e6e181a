"""Notes that are nearly the same: another name or date, sentences in another order, some in other words.

Two notes are as alike as the share of word pairs that they have in common (Jaccard). MinHash estimates it,
and locality-sensitive hashing finds the pairs, so that time grows with the number of notes, not with its
square (Broder 1997; Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3)."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

MIN_ALIKE = 0.36  # unrelated notes of the same kind reach 0.31
MIN_ALIKE_SHORT = 0.55  # short dialogues are made of the same questions
SHORT_NOTE = 30  # words
_N_BANDS = 42
_N_ROWS = 3  # per band: finds 94 of 100 pairs that are 0.4 alike, and nearly all above 0.5
_NOTES_PER_PART = 1000
_WORD = re.compile(r"\w+")


def similar_notes(notes: Sequence[str], n_known: int = 0) -> list[tuple[int, int, float]]:
    """(note, an earlier one that it is like, how alike from 0 to 1), by index, at most once per note.

    With `n_known`, later notes are compared with the first `n_known` only. Deterministic."""
    best = {}
    for note, known, share in _alike_pairs(notes, n_known):
        best[note] = max(best.get(note, (0.0, 0)), (share, known))
    return [(note, known, share) for note, (share, known) in sorted(best.items())]


def groups_of_similar(notes: Sequence[str]) -> list[int]:
    """A group's number for each note: notes that are alike, also through others, are in the same one."""
    above = list(range(len(notes)))  # a note of the same group, or itself

    def top(note: int) -> int:
        while above[note] != note:
            above[note] = above[above[note]]
            note = above[note]
        return note

    for note, known, _ in _alike_pairs(notes):
        above[top(note)] = top(known)
    return [top(note) for note in above]


def _alike_pairs(notes: Sequence[str], n_known: int = 0) -> Iterator[tuple[int, int, float]]:
    """What `similar_notes` chooses from; a pair may come several times."""
    import numpy as np

    if len(notes) < 2:
        return
    signatures, n_words = _signatures(notes)
    later = np.arange(len(notes))
    mix = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
    for start in range(0, _N_BANDS * _N_ROWS, _N_ROWS):
        # The first note with the same values: a thousand copies of one note make no million pairs
        keys = signatures[:, start : start + _N_ROWS] @ mix
        _, firsts, kinds = np.unique(keys, return_index=True, return_inverse=True)
        earlier = firsts[kinds]
        pairs = (earlier < (n_known or later)) & (later >= n_known)
        pairs = np.stack([later[pairs], earlier[pairs]])
        alike = np.equal(*signatures[pairs]).mean(1)
        is_short = n_words[pairs].min(0) < SHORT_NOTE
        enough = alike >= np.where(is_short, MIN_ALIKE_SHORT, MIN_ALIKE)
        yield from zip(*pairs[:, enough].tolist(), alike[enough].tolist())


def _signatures(notes: Sequence[str]) -> "tuple[np.ndarray, np.ndarray]":
    """(uint32 (n_notes, 126): the least value of each of 126 hash functions over a note's word pairs;
    the numbers of words)."""
    import numpy as np
    import pandas as pd

    factors = np.random.default_rng(1).integers(0, 2**32, (2, _N_BANDS * _N_ROWS), dtype=np.uint32) | 1
    signatures = []
    n_words = []
    for start in range(0, len(notes), _NOTES_PER_PART):
        # A mark between notes, so that no note is without a pair
        words = [["", *_WORD.findall(note.casefold())] for note in notes[start : start + _NOTES_PER_PART]]
        flat = pd.util.hash_array(np.array([*itertools.chain(*words), ""], object))
        pairs = (flat[:-1] * np.uint64(0x9E3779B97F4A7C15) ^ flat[1:]).astype(np.uint32)
        starts = np.cumsum([0, *map(len, words[:-1])])
        n_words += [len(words_of_note) - 1 for words_of_note in words]
        least = []
        for factor, second_factor in factors.T:
            mixed = pairs * factor
            mixed ^= mixed >> np.uint32(16)  # else the 126 functions are too much like each other
            least.append(np.minimum.reduceat(mixed * second_factor, starts))
        signatures.append(np.stack(least, 1))
    return np.concatenate(signatures), np.array(n_words)
