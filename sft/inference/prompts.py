"""The prompts of notes, within what the model takes. Knows no model."""

from dataclasses import dataclass

from sft.cli import InputError
from sft.data.prompt import PromptEncoder
from sft.grounding.sentences import sentence_spans


@dataclass
class NotePrompts:
    """Encodes notes as training did.

    window            tokens of prompt and summary together, at most
    longest_prompt    tokens of a prompt, at most
    trained_length    tokens of prompt and summary in training, at most; 0: not known"""

    encoder: PromptEncoder
    window: float
    longest_prompt: float
    trained_length: int

    def max_note_tokens(self, max_new_tokens: int) -> float:
        """How many tokens a note may have. Raises InputError if none."""
        limit = min(self.window - max_new_tokens, self.longest_prompt) - self.encoder.n_template_tokens
        if limit < 1:
            option, why, fix = self._reason_for_limit(max_new_tokens)
            raise InputError(f"{option} leaves no room for a note: {why}", fix)
        return limit

    def _reason_for_limit(self, max_new_tokens: int) -> tuple[str, str, str]:
        """The option that limits a prompt, with its value; why; what to do."""
        if self.longest_prompt <= self.window - max_new_tokens:
            own = f"{self.encoder.n_template_tokens} of them for the instruction"
            return f"--max_length {self.longest_prompt}", f"tokens of the prompt, {own}", "raise --max_length"
        why = f"prompt and summary together may have at most {self.window} tokens"
        return f"--max_new_tokens {max_new_tokens}", why, "lower --max_new_tokens"

    def ids(self, note: str, max_new_tokens: int) -> tuple[list[int], list[str]]:
        """(token ids of the prompt, warnings). A note too long for the model is shortened at a sentence
        boundary. Raises InputError if there is no room for a note."""
        limit = self.max_note_tokens(max_new_tokens)
        warnings = []
        note_ids = None
        # A token of text rarely has 100 characters: of an enormous note only the beginning is tokenized
        if len(note) <= limit * 100:
            note_ids = self.encoder.encode_texts([self.encoder.template.render_note(note)])[0]
        if note_ids is None or len(note_ids) > limit:
            note_ids, n_kept = self.encoder.shorten(note, limit)
            n_sentences = len(sentence_spans(note, self.encoder.template.sentence_version))
            kept = f"its first {n_kept} of {n_sentences} sentences"
            if n_kept == 0:
                kept = "the beginning of its first sentence"
            option, why, _ = self._reason_for_limit(max_new_tokens)
            warnings.append(f"note shortened: only {kept} fit with {option} ({why})")
        ids = self.encoder.prompt(note_ids)
        if self.trained_length and len(ids) > self.trained_length:
            trained = f"trained on up to {self.trained_length}"
            warnings.append(f"prompt longer than any in training: {len(ids)} tokens, {trained}")
        return ids, warnings
