"""The prompt around a note, and the tokens of notes and summaries: one way for training and inference.

Both build their prompts here, with the same functions, so that they cannot differ.
"""

import bisect
import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sft.cli import InputError
from sft.grounding.sentences import number_sentences, sentence_spans

INSTRUCTION = "Summarize the clinical note. State only what the note says."
EVIDENCE_INSTRUCTION = (
    INSTRUCTION
    + " After each sentence cite the note's sentences it rests on, like [Evidence: S1,2; Conf: 0.85]."
)
_NOTE_MARK, _ANSWER_MARK = "CLINICAL-NOTE-STANDS-HERE", "SUMMARY-STANDS-HERE"


# ------------------------------------------------------------------------------------------------ prompt


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a note. Saved beside the adapter and read back by inference, never rendered anew: some chat
    templates write the day's date."""

    prefix: str
    suffix: str
    add_special_tokens: (
        bool  # whether the tokenizer puts its own BOS before `prefix` (a chat template has written it)
    )
    end_token_id: int  # ends the summary; supervised in training
    stop_token_ids: tuple[int, ...]  # generation stops at each of these
    number_sentences: bool  # the note's sentences stand on lines of their own, numbered S1, S2, ...

    @classmethod
    def from_dict(cls, values: dict) -> "PromptTemplate":
        """Raises KeyError or TypeError where a value is missing or of another type."""
        texts = all(isinstance(values[name], str) for name in ("prefix", "suffix"))
        stops = values["stop_token_ids"] and all(
            isinstance(token, int) for token in (*values["stop_token_ids"], values["end_token_id"])
        )
        if not (texts and stops):
            raise TypeError("the prompt's parts are of other types")
        return cls(**{**values, "stop_token_ids": tuple(values["stop_token_ids"])})

    def render_note(self, note: str) -> str:
        return "\n".join(number_sentences(note)) if self.number_sentences else note


def _chat_messages(tokenizer, instruction: str) -> list[dict[str, str]]:
    """Instruction and the note's place as chat messages: system and user, or one user message where the template knows no system role."""
    from jinja2 import TemplateError

    choices = (
        [{"role": "system", "content": instruction}, {"role": "user", "content": _NOTE_MARK}],
        [{"role": "user", "content": f"{instruction}\n\n{_NOTE_MARK}"}],
    )
    for messages in choices:
        try:
            text = render(tokenizer, messages, add_generation_prompt=True)
        except (TemplateError, ValueError):  # no system role; several templates, none of them the default
            continue
        if instruction in text and text.count(_NOTE_MARK) == 1:
            return messages
    raise InputError(
        "the tokenizer's chat template leaves out the user's message",
        "use another model, or a tokenizer without a chat template",
    )


def render(tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """The chat template's text. Templates that know a thinking mode leave it out; the others ignore that argument."""
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
    )


def build_template(
    tokenizer, *, instruction: str | None = None, number_sentences: bool = False
) -> PromptTemplate:
    """The tokenizer's chat template around the note where there is one, a plain template where there is none.

    Raises InputError if the tokenizer has no token that can end a summary.
    """
    instruction = instruction or (EVIDENCE_INSTRUCTION if number_sentences else INSTRUCTION)
    end = tokenizer.eos_token_id
    if tokenizer.chat_template:
        messages = _chat_messages(tokenizer, instruction)
        prefix, suffix = render(tokenizer, messages, add_generation_prompt=True).split(_NOTE_MARK)
        answered = [*messages, {"role": "assistant", "content": _ANSWER_MARK}]
        _, mark, after = render(tokenizer, answered).rpartition(_ANSWER_MARK)
        after_ids = (
            tokenizer(after.lstrip(), add_special_tokens=False).input_ids if mark and after.strip() else []
        )
        if after_ids and after_ids[0] in control_token_ids(tokenizer):
            end = after_ids[0]  # <|im_end|>, <|eot_id|>, <end_of_turn>: often not the tokenizer's EOS
    else:
        prefix, suffix = f"### Instruction:\n{instruction}\n\n### Clinical note:\n", "\n\n### Summary:\n"
    if end is None:
        raise InputError(
            "the tokenizer has no end-of-sequence token", "set eos_token in its tokenizer_config.json"
        )
    stops = tuple(dict.fromkeys(token for token in (end, tokenizer.eos_token_id) if token is not None))
    return PromptTemplate(prefix, suffix, not tokenizer.chat_template, end, stops, number_sentences)


# ------------------------------------------------------------------------------------------------ tokens


def control_token_strings(tokenizer) -> dict[str, int]:
    """The added tokens that steer a model: special ones, and those its chat template writes (white space apart)."""
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.items()
    return {
        token.content: id
        for id, token in added
        if token.special or (token.content.strip() and token.content in template)
    }


def control_token_ids(tokenizer) -> frozenset[int]:
    unknown = {tokenizer.unk_token_id} - {
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
    }
    return (
        frozenset([*control_token_strings(tokenizer).values(), *tokenizer.all_special_ids]) - unknown
    )  # <unk> steers nothing


class PromptEncoder:
    """Notes and summaries to token ids, one way for training and inference.

    Template, note and summary are tokenised apart, so the boundary between prompt and summary is the same whether or
    not the summary is there yet, and text from a note can never become a control token.
    """

    def __init__(self, tokenizer, template: PromptTemplate):
        self.tokenizer, self.template = tokenizer, template
        prefix = tokenizer(template.prefix, add_special_tokens=template.add_special_tokens).input_ids
        if template.add_special_tokens and prefix and prefix[-1] == tokenizer.eos_token_id:
            prefix = prefix[:-1]  # some tokenizers end every text with EOS
        self.prefix_ids: list[int] = prefix
        self.suffix_ids: list[int] = tokenizer(template.suffix, add_special_tokens=False).input_ids
        self.n_template_tokens = len(self.prefix_ids) + len(self.suffix_ids)
        self.control_ids = control_token_ids(tokenizer)
        strings = sorted((s for s in control_token_strings(tokenizer) if len(s) > 1), key=len, reverse=True)
        self._control_strings = re.compile("|".join(map(re.escape, strings)) or r"(?!)")

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts, without control tokens whatever the texts hold."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        ).input_ids
        return [
            ids if self.control_ids.isdisjoint(ids) else self._encode_apart(text)
            for text, ids in zip(texts, encoded)
        ]

    def _encode_apart(self, text: str) -> list[int]:
        """For what split_special_tokens lets through (it knows special tokens only): control strings are cut in two."""
        cuts = [0, *(match.start() + 1 for match in self._control_strings.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
        encoded = self.tokenizer(pieces, add_special_tokens=False, split_special_tokens=True).input_ids
        return [token for ids in encoded for token in ids if token not in self.control_ids]

    def prompt(self, note_ids: list[int]) -> list[int]:
        return self.prefix_ids + note_ids + self.suffix_ids

    def shorten(self, note: str, room: int) -> tuple[list[int], int]:
        """The most of `note`'s leading sentences that fit `room` tokens: (token ids, number of sentences kept).

        Where not even the first sentence fits it is cut between words, and 0 sentences count as kept.
        """
        note = note[: room * 100]  # more than fits, so that a 10 MB note costs no more than this
        if self.template.number_sentences:
            lines = number_sentences(note)
            ends = list(itertools.accumulate((len(line) + 1 for line in lines), initial=-1))[1:]
            text = "\n".join(lines)
        else:
            ends, text = [end for _, end in sentence_spans(note)], note
        ids, kept = self._most_that_fits(text, ends, room)
        if not kept:
            ids, _ = self._most_that_fits(text, [match.end() for match in re.finditer(r"\S+", text)], room)
        return ids or self.encode_texts([text])[0][:room], kept

    def _most_that_fits(self, text: str, ends: list[int], room: int) -> tuple[list[int], int]:
        """The longest text[:end] of at most `room` tokens: (its token ids, how many of `ends` it reaches)."""
        encodings = functools.cache(
            lambda kept: self.encode_texts([text[: ends[kept - 1]]])[0] if kept else []
        )
        kept = self._estimate(text, ends, room)
        if len(encodings(kept)) > room or (
            kept < len(ends) and len(encodings(kept + 1)) <= room
        ):  # rare: search
            kept = bisect.bisect_right(range(1, len(ends) + 1), room, key=lambda kept: len(encodings(kept)))
        return encodings(kept), kept

    def _estimate(self, text: str, ends: list[int], room: int) -> int:
        """How many of `ends` the first `room` tokens of the whole text reach: off only where a text's end changes its tokens."""
        if not self.tokenizer.is_fast:
            return 0
        offsets = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
        ).offset_mapping
        return bisect.bisect_right(ends, offsets[room][0]) if len(offsets) > room else len(ends)


def pad_token_id(tokenizer) -> int:
    """A token to pad with that the model already has; which one does not matter, padding is masked by length."""
    known = (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        0,
    )  # a [PAD] added later may lie beyond the embedding
    return next(token for token in known if token is not None)
