"""Whether a written sentence can be traced to the part of the note that it was written from."""

from collections.abc import Mapping, Sequence

from sft.grounding.structure import content_stems


def accept(part: str, sentence: str, note: str, shorthand: Mapping[str, Sequence[str]] = {}) -> list[str]:
    """Why `sentence` may not stand for `part`, in a few words each; empty: it may."""
    words = iter(content_stems(part))
    missing = next((word for word in content_stems(sentence) if word not in words), None)
    return [] if missing is None else [f"not in the note at this place: '{missing}'"]
