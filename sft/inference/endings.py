"""How writing ends: where token ids begin to say the same again and again, and what is kept of a text that
did not come to its own end."""

import re
from collections.abc import Callable, Sequence, Set

from sft.grounding.citations import citation_spans
from sft.grounding.sentences import sentence_spans

# How many tokens must come again beyond one whole repetition. Of 2,051 summaries that people wrote, none has
# more than 2 (a citation's sentences and readings one after the other: 13, where all numbers count as equal)
REPEATED_TOKENS = 12
REPEATED_NUMBERED_TOKENS = 120  # where only numbers differ, as in lists, doses that are reduced, and readings

_OPEN_BRACKET = re.compile(r"[\[({<【](?:[^\[\](){}<>【】\n.]|\.(?!\s))*\Z")


def number_ids(tokenizer) -> frozenset[int]:
    """The tokens that are digits, with or without the space before them."""
    vocabulary = tokenizer.get_vocab()
    return frozenset(token for text, token in vocabulary.items() if text.strip("\u0120\u2581 ").isdecimal())


def repeated_from(ids: Sequence[int], numbers: Set[int] = frozenset()) -> int | None:
    """The index in `ids` where their end begins to repeat what stands before it, once it has gone on for long
    enough to be a loop; None if it has not.

    Also finds what repeats itself but for its numbers (tokens in `numbers`), as in "1. Rest. 2. Rest.", after
    longer. Takes time linear in the ids, except where long passages are nearly repeated."""
    start = _repeated_from(ids, REPEATED_TOKENS)
    if start is not None or len(ids) <= REPEATED_NUMBERED_TOKENS:
        return start
    # One sign for each number, however many tokens it has
    kept = [i for i, token in enumerate(ids) if token not in numbers or not i or ids[i - 1] not in numbers]
    start = _repeated_from([-1 if ids[i] in numbers else ids[i] for i in kept], REPEATED_NUMBERED_TOKENS)
    return None if start is None else kept[start]


def _repeated_from(ids: Sequence[int], n_more: int) -> int | None:
    n = len(ids)
    for period in range(1, (n - n_more) // 2 + 1):
        start = n - period - n_more
        # The newest first: nearly all differ there
        is_repeated = ids[-1] == ids[-1 - period] and ids[-n_more:] == ids[-n_more - period : -period]
        if is_repeated and ids[start:] == ids[start - period : n - period]:
            while start > period and ids[start - 1] == ids[start - 1 - period]:
                start -= 1
            return start
    return None


def ended_text(sequence, decode: Callable[[Sequence[int]], str]) -> tuple[str, list[str]]:
    """(text, warnings) of a GeneratedSequence: its text without what it repeated or did not finish, and what
    was left out. `decode` turns token ids into text."""
    n_end_tokens = 1 if sequence.finish_reason == "stop" else 0
    n_tokens = len(sequence.ids)
    text = decode(sequence.ids[: n_tokens - n_end_tokens])
    if sequence.finish_reason == "loop":
        n_first = len(decode(sequence.ids[: sequence.n_kept]))
        return without_repetition(text, n_first).strip(), [
            "stopped because it repeated itself: the repetition was dropped"
        ]
    if sequence.finish_reason == "length":
        kept = without_fragment(text).strip()
        dropped = "" if kept == text.strip() else "its last, unfinished sentence was dropped; "
        return kept, [f"summary cut after {n_tokens} tokens: {dropped}raise max_new_tokens"]
    return text.strip(), []


def without_repetition(text: str, n_first: int) -> str:
    """`text`, which repeats itself after its first `n_first` characters, up to there and on to the end of the
    sentence; to the end of the clause, if the sentence has none; else without that sentence."""
    n_first = len(text[:n_first].rstrip(" \n,;"))
    citations = citation_spans(text)
    ends = [end for _, end in (*sentence_spans(text)[:-1], *citations) if end >= n_first]
    if ends:
        # With the citation that follows
        cited = dict(citations)
        end = min(ends)
        start = end + len(text[end:]) - len(text[end:].lstrip())
        return _OPEN_BRACKET.sub("", text[: cited.get(start, end)]).rstrip()
    clause_end = re.compile(r"[,;](?=\s)").search(text, n_first)
    if clause_end:
        return _OPEN_BRACKET.sub("", text[: clause_end.start()]).rstrip()
    return without_fragment(text[:n_first] + re.match(r"\w*", text[n_first:])[0])


def without_fragment(text: str) -> str:
    """`text` up to the end of its last complete sentence or citation; the whole text if it has none."""
    text = _OPEN_BRACKET.sub("", text).rstrip("\ufffd")
    # Would another sentence begin here? "38." may have been about to be 38.5
    ends = [end for _, end in sentence_spans(f"{text} Then")][:-1]
    if re.search(r"\d\.\s*\Z", text):
        ends = [end for end in ends if end < len(text.rstrip())]
    ends += [end for _, end in citation_spans(text)]
    whole = (text[:end] for end in sorted(ends, reverse=True) if text[end - 1] != ":")
    return next(whole, text.rstrip())
