"""The prompt around a note, and the tokens of notes and summaries.

Training and inference both build their prompts here, with the same functions, so that they cannot differ."""

import bisect
import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft.cli import InputError, first_line, log, on_main_process, preview_list
from sft.grounding.sentences import SENTENCE_VERSION, number_sentences, sentence_spans

INSTRUCTION = "Summarize the clinical note. State only what the note says."
EVIDENCE_INSTRUCTION = (
    INSTRUCTION
    + " After each sentence cite the note's sentences it rests on, like [Evidence: S1,2; Conf: 0.85]."
)
# Put into a chat template to find out where it places the note and the answer
_NOTE_MARK = "CLINICAL-NOTE-GOES-HERE"
_ANSWER_MARK = "SUMMARY-GOES-HERE"
# A prompt that ends within thoughts: "<think>\n"
_OPEN_THOUGHTS = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")


# ------------------------------------------------------------------------------- template


@dataclass(frozen=True)
class PromptTemplate:
    """The text around a note. Saved with the adapter and read back by inference, never rendered a second
    time, because some chat templates write the day's date.

    prefix, suffix        text before and after the note
    add_special_tokens    whether the tokenizer adds its own BOS before `prefix` (a chat template writes it)
    end_token_id          ends the summary; carries loss in training
    stop_token_ids        generation stops at each of these
    number_sentences      whether the note's sentences are lines of their own, numbered S1, S2, ...
    sentence_version      of the rules that find the sentences; adapters of format 1 and 2 do not name theirs
    """

    prefix: str
    suffix: str
    add_special_tokens: bool
    end_token_id: int
    stop_token_ids: tuple[int, ...]
    number_sentences: bool
    sentence_version: int = 1

    @classmethod
    def from_dict(cls, values: dict) -> "PromptTemplate":
        """Raises KeyError or TypeError if a value is missing or of another type."""
        stop_token_ids = tuple(values["stop_token_ids"])
        are_texts = all(isinstance(values[name], str) for name in ("prefix", "suffix"))
        are_tokens = all(isinstance(token, int) for token in (*stop_token_ids, values["end_token_id"]))
        is_known = values.get("sentence_version", 1) in range(1, SENTENCE_VERSION + 1)
        if not (are_texts and are_tokens and stop_token_ids and is_known):
            raise TypeError("the prompt's parts are of other types")
        return cls(**{**values, "stop_token_ids": stop_token_ids})

    @property
    def cited_version(self) -> int | None:
        """Of the sentence numbers that a summary may cite; None if the prompt has none."""
        return self.sentence_version if self.number_sentences else None

    def render_note(self, note: str) -> str:
        return "\n".join(number_sentences(note, self.sentence_version)) if self.number_sentences else note


def build_template(
    tokenizer,
    *,
    instruction: str | None = None,
    number_sentences: bool = False,
    sentence_version: int = SENTENCE_VERSION,
    thinking: bool = False,
    is_untrained: Callable[[int], bool] = lambda token: False,
) -> PromptTemplate:
    """The tokenizer's chat template around the note, or a plain template if it has none; with `thinking`, in
    the template's thinking mode. A token that `is_untrained` ends no summary if EOS can.

    Raises InputError if the tokenizer has no token that can end a summary, or its chat template does not show
    the note."""
    # Stripped as chat templates do with a message
    instruction = (instruction or (EVIDENCE_INSTRUCTION if number_sentences else INSTRUCTION)).strip()
    end = eos = tokenizer.eos_token_id
    if tokenizer.chat_template:
        prefix, suffix, after = _around_answer(tokenizer, instruction, thinking)
        # The control token after an answer, <|im_end|> or <|eot_id|>, is often not the tokenizer's EOS
        first = tokenizer(after.lstrip(), add_special_tokens=False).input_ids[:1]
        end = next((token for token in first if token in control_token_ids(tokenizer)), eos)
    else:
        prefix = f"### Instruction:\n{instruction}\n\n### Clinical note:\n"
        suffix = "\n\n### Summary:\n"
    if end is None:
        fix = "set eos_token in its tokenizer_config.json"
        raise InputError("the tokenizer has no end-of-sequence token", fix)
    stops = [end] if eos in (None, end) else [end, eos]
    if is_untrained(end):
        said = f"the base model never learned {tokenizer.convert_ids_to_tokens(end)}, the end of an answer"
        end = next((token for token in stops if not is_untrained(token)), end)
        if end == stops[0]:
            _log_on_main(f"warning: {said}: summaries may not end; use an instruct model")
        else:
            _log_on_main(f"info: {said}: summaries end with {tokenizer.eos_token}")
    return PromptTemplate(
        prefix=prefix,
        suffix=suffix,
        add_special_tokens=not tokenizer.chat_template,
        end_token_id=end,
        stop_token_ids=tuple(stops),
        number_sentences=number_sentences,
        sentence_version=sentence_version,
    )


def set_chat_template(tokenizer, name_or_file: str | None) -> None:
    """Gives the tokenizer the chat template in a file, or its own of that name. Raises InputError if there is
    none, or if the tokenizer has several and nothing says which."""
    own = tokenizer.chat_template
    if name_or_file is not None and not (isinstance(own, dict) and name_or_file in own):
        try:
            tokenizer.chat_template = Path(name_or_file).read_text(encoding="utf-8")
        except (OSError, ValueError):
            fix = "pass a file with a jinja template, or the name of one of the tokenizer's own"
            raise InputError(f"--chat_template {name_or_file}: not a readable text file", fix) from None
    elif isinstance(own, dict):
        name = name_or_file or ("default" if "default" in own else None)
        if name is None:
            problem = f"the tokenizer has several chat templates and no default: {preview_list(own, 12)}"
            raise InputError(problem, "choose one with --chat_template NAME")
        tokenizer.chat_template = own[name]


def _around_answer(tokenizer, instruction: str, thinking: bool) -> tuple[str, str, str]:
    """(text before the note, text between note and answer, text after the answer) of the chat template, with
    system and user, or one user message if the template knows no system role.

    The text before the answer is the template's prompt, with what it writes between prompt and answer once
    the answer is known: a channel's name, an empty block of thoughts. A block of thoughts that the prompt
    opens, and that is not in an answered conversation, is left out."""
    from jinja2 import TemplateError

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        # Templates that know no thinking ignore that argument
        options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": thinking}
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    choices = (
        [{"role": "system", "content": instruction}, {"role": "user", "content": _NOTE_MARK}],
        [{"role": "user", "content": f"{instruction}\n\n{_NOTE_MARK}"}],
    )
    reason = "it leaves out the user's message"
    for messages in choices:
        try:
            prompt = render(messages, True)
        # As if there is no system role
        except (TemplateError, ValueError) as error:
            reason = first_line(error)
            continue
        if instruction in prompt and prompt.count(_NOTE_MARK) == 1:
            break
    else:
        fix = "pass another with --chat_template FILE, or use another model"
        raise InputError(f"the tokenizer's chat template cannot be used: {reason}", fix)
    answered = render([*messages, {"role": "assistant", "content": _ANSWER_MARK}], False)
    before, mark, after = answered.rpartition(_ANSWER_MARK)
    opens_thoughts = prompt.startswith(before) and _OPEN_THOUGHTS.search(prompt[len(before) :])
    # A blank alone would be a token of its own before the summary's first word
    if mark and (opens_thoughts or (before.startswith(prompt) and before[len(prompt) :].strip())):
        prompt = before
    elif mark and before.rstrip() != prompt.rstrip():
        said = "the chat template writes an answered conversation otherwise than its prompt and the answer"
        _log_on_main(f"info: {said}; the summary follows the prompt")
    prefix, suffix = prompt.split(_NOTE_MARK)
    return prefix, suffix, after if mark else ""


def _log_on_main(message: str) -> None:
    if on_main_process():
        log(message)


# ------------------------------------------------------------------------------- special tokens


def control_token_ids(tokenizer) -> frozenset[int]:
    """The tokens that steer a model, which text must never become."""
    ends_and_padding = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    # <unk> steers nothing
    unknown = {tokenizer.unk_token_id} - ends_and_padding
    return frozenset([*_control_strings(tokenizer).values(), *tokenizer.all_special_ids]) - unknown


def _control_strings(tokenizer) -> dict[str, int]:
    """Added tokens that are special or that the chat template writes (except white space), as text -> id."""
    template = str(tokenizer.chat_template or "")
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content.strip() and token.content in template)
    }


def pad_token_id(tokenizer) -> int:
    """A token to pad with that the model already has; any will do, since padding is masked by length."""
    # EOS first: a [PAD] that was added later may lie beyond the embedding
    known = (tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    return next(token for token in known if token is not None)


# ------------------------------------------------------------------------------- encoder


class PromptEncoder:
    """Notes and summaries to token ids.

    Template, note and summary are tokenized separately, so that the boundary between prompt and summary is
    the same whether or not the summary is there yet, and text from a note can never become a control token.
    """

    def __init__(self, tokenizer, template: PromptTemplate):
        self.tokenizer = tokenizer
        self.template = template
        prefix = tokenizer(template.prefix, add_special_tokens=template.add_special_tokens).input_ids
        # Some tokenizers end every text with EOS
        if template.add_special_tokens and prefix and prefix[-1] == tokenizer.eos_token_id:
            prefix = prefix[:-1]
        self.prefix_ids: list[int] = prefix
        self.suffix_ids: list[int] = tokenizer(template.suffix, add_special_tokens=False).input_ids
        self.n_template_tokens = len(self.prefix_ids) + len(self.suffix_ids)
        self.control_ids = control_token_ids(tokenizer)
        strings = [string for string in _control_strings(tokenizer) if len(string) > 1]
        longest_first = sorted(strings, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts, without control tokens whatever the texts hold."""
        if not texts:
            return []
        encoded = self._tokenize(list(texts)).input_ids
        return [
            ids if self.control_ids.isdisjoint(ids) else self._encode_in_pieces(text)
            for text, ids in zip(texts, encoded)
        ]

    def _tokenize(self, texts: str | list[str], **options):
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            **options,
        )

    def _encode_in_pieces(self, text: str) -> list[int]:
        """Cuts control strings in two, for those that split_special_tokens, which knows special tokens only,
        lets through."""
        cuts = [0, *(match.start() + 1 for match in self._control_pattern.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(cuts)]
        encoded = self._tokenize(pieces).input_ids
        return [token for ids in encoded for token in ids if token not in self.control_ids]

    def prompt(self, note_ids: list[int]) -> list[int]:
        return self.prefix_ids + note_ids + self.suffix_ids

    def shorten(self, note: str, room: int) -> tuple[list[int], int]:
        """The leading sentences of `note` that fit into `room` tokens: (token ids, number of sentences).

        If not even the first sentence fits, it is cut between words, or between characters if words are long,
        and 0 sentences count as kept."""
        # More than fits, so that a 10 MB note costs no more than this
        note = note[: room * 100]
        if self.template.number_sentences:
            lines = number_sentences(note, self.template.sentence_version)
            text = "\n".join(lines)
            ends = list(itertools.accumulate((len(line) + 1 for line in lines), initial=-1))[1:]
        else:
            text = note
            ends = [end for _, end in sentence_spans(note, self.template.sentence_version)]
        ids, n_kept = self._longest_that_fits(text, ends, room)
        if not n_kept:
            ids, _ = self._longest_that_fits(text, [word.end() for word in re.finditer(r"\S+", text)], room)
        # Text without blanks, as Chinese
        if not n_kept and len(ids) < room // 2:
            between = [end for end in range(1, len(text)) if not unicodedata.combining(text[end])]
            ids, _ = self._longest_that_fits(text, [*between, len(text)], room)
        return ids, n_kept

    def _longest_that_fits(self, text: str, ends: list[int], room: int) -> tuple[list[int], int]:
        """The longest text[:end] of at most `room` tokens: (its token ids, how many of `ends` it reaches)."""

        @functools.cache
        def encode(n_kept: int) -> list[int]:
            return self.encode_texts([text[: ends[n_kept - 1]]])[0] if n_kept else []

        # By the whole text's tokens, unless the tokenizer is slow and knows no places of tokens
        if self.tokenizer.is_fast:
            offsets = self._tokenize(text, return_offsets_mapping=True).offset_mapping
            n_kept = bisect.bisect_right(ends, offsets[room][0]) if len(offsets) > room else len(ends)
        else:
            n_kept = bisect.bisect_right(range(1, len(ends) + 1), room, key=lambda n: len(encode(n)))
        # The end of a text may change its tokens
        while n_kept and len(encode(n_kept)) > room:
            n_kept -= 1
        while n_kept < len(ends) and len(encode(n_kept + 1)) <= room:
            n_kept += 1
        return encode(n_kept), n_kept
