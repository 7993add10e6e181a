"""What is compared: the systems, and their summaries, kept in a file each as they are written."""

import contextlib
import copy
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from sft.cli import InputError, log, plural
from sft.data.prompt import PromptEncoder
from sft.data.rows import Row
from sft.evaluation.measures import text_spans
from sft.grounding.selector import fit_selector, quote
from sft.grounding.sentences import split_sentences
from sft.inference.note_files import PartialFile, read_results
from sft.inference.results import check_result, to_json


class Adapter(NamedTuple):
    number: str  # "_1", "_2", ...: the end of its systems' names; "" if it is the only one
    folder: Path
    sft_config: dict
    has_selector: bool


class System(NamedTuple):
    """`model`: "base", "specialist", or "" if no model writes; `writing`: how, as --writing says it."""

    name: str
    says: str
    model: str = ""
    needs_training_rows: bool = False
    writing: str = "free"
    seed: int | None = None  # of a summary that is drawn; None: greedy
    adapter: Adapter | None = None  # whose system it is, once chosen

    @property
    def loads_model(self) -> bool:
        return bool(self.model) and self.writing != "quote"


SYSTEMS = (
    System("base", "the base model with the specialist's prompt", "base"),
    System("base_examples", "the base model with two training examples in the prompt", "base", True),
    System("free", "the specialist, writing freely", "specialist"),
    System("verified", "sentences of the note, in the specialist's words where these can be traced to it", "specialist",
           writing="verified"),
    System("quote", "sentences of the note, chosen by the specialist's selector", "specialist", writing="quote"),
    System("selected", "sentences of the note, chosen as training summaries would", needs_training_rows=True),
    System("lead", "the note's first two and last three sentences"),
    System("commonest", "the commonest training summary, whatever the note", needs_training_rows=True),
    System("reference", "the reference summary: the ceiling, and the check's false alarms"),
)  # fmt: skip
SAMPLES = tuple(System(f"sample_{seed}", "drawn at random", "specialist", seed=seed) for seed in range(4))
_TEMPERATURE = 0.7  # of samples


def write_without_model(
    name: str, rows: Mapping, training: Sequence, version: int
) -> Iterator[tuple[int, dict]]:
    """Yields (number, result) of a system that no model writes. `version`: of the notes' sentence numbers."""
    if name == "commonest":
        [(commonest, _)] = Counter(row.model_summary for row in training).most_common(1)
    if name == "selected":
        selector = fit_selector((row.clinical_note, row.model_summary) for row in training)
    for number, row in rows.items():
        if name == "lead":
            sentences = split_sentences(row.clinical_note)
            summary = " ".join(sentences if len(sentences) <= 5 else sentences[:2] + sentences[-3:])
        elif name == "selected":
            summary = " ".join(sentence.text for sentence in quote(row.clinical_note, selector))
        else:
            summary = commonest if name == "commonest" else row.model_summary
        yield number, {"generated_summary": summary, **check_result(row.clinical_note, summary, version)}


def with_examples(encoder: PromptEncoder, rows: Sequence[Row], n_tokens: int) -> PromptEncoder:
    """The same prompt after two rows as earlier turns, prompt and answer: the shorter half's longest notes
    whose turn has at most `n_tokens`."""
    by_length = sorted({row.note_key: row for row in rows}.values(), key=lambda row: len(row.clinical_note))

    def turn(row: Row) -> list[int]:
        texts = [encoder.template.render_note(row.clinical_note), row.model_summary]
        note_ids, summary_ids = encoder.encode_texts(texts)
        return [*encoder.prompt(note_ids), *summary_ids, encoder.template.end_token_id]

    turns = (ids for ids in map(turn, reversed(by_length[: len(by_length) // 2 + 1])) if len(ids) <= n_tokens)
    turns = list(islice(turns, 2))
    if len(turns) < 2:
        log(f"warning: base_examples has {plural(len(turns), 'example')}: no other fits the context window")
    shown = copy.copy(encoder)
    shown.prefix_ids = [*chain.from_iterable(turns), *encoder.prefix_ids]
    shown.n_template_tokens = len(shown.prefix_ids) + len(shown.suffix_ids)
    return shown


def log_likelihoods(inference, prompt: Sequence[int], target: Sequence[int]) -> list[float]:
    """Of each token of `target` after the prompt and those before it, in nats."""
    import torch

    tokens = torch.tensor([[*prompt, *target]], device=inference.placement.device)
    n = len(target)
    with torch.inference_mode():
        logits = inference.model(input_ids=tokens, logits_to_keep=n + 1, use_cache=False).logits
        # The last one predicts what follows the target
        log_probs = logits[0, -n - 1 : -1].float().log_softmax(-1)
    return log_probs.gather(1, tokens[0, -n:, None])[:, 0].tolist()


def reference_loss(inference, row: Row) -> tuple[float, int]:
    """(cross-entropy in nats summed over the reference summary and its end token, tokens); (0, 0) if they
    leave no room for a note in the context window."""
    encoder = inference.prompts.encoder
    target = [*encoder.encode_texts([row.model_summary])[0], encoder.template.end_token_id]
    with contextlib.suppress(InputError):
        prompt, _ = inference.prompt_ids(row.clinical_note, len(target))
        return -sum(log_likelihoods(inference, prompt, target)), len(target)
    return 0, 0


def sentence_support(inference, note: str, summary: str) -> list[tuple[float, float]]:
    """(after the note, without it) for each sentence of a summary, as of text_spans: the mean log-likelihood
    of its tokens after the prompt and the sentences before it, in nats."""
    encoder = inference.prompts.encoder
    ends = [end for _, end in text_spans(summary)]
    pieces = encoder.encode_texts([summary[start:end] for start, end in zip([0, *ends], ends)])
    target = [token for ids in pieces for token in ids]
    if not target:
        return []
    means = []
    for prompt in (inference.prompt_ids(note, len(target))[0], encoder.prompt([])):
        left = iter(log_likelihoods(inference, prompt, target))
        means.append([sum(next(left) for _ in ids) / max(1, len(ids)) for ids in pieces])
    return list(zip(*means))


def write_with_model(
    inference, system: System, rows: Mapping, examples: Sequence, settings: dict
) -> Iterator:
    """Yields (number, result). `examples`: rows for the prompt; `settings`: of summarize. Results of free
    writing have `reference_loss`, the specialist's `model_support` too."""
    if system.loads_model:
        inference.load()
        plain = inference.encoder
        room = int(min(inference.prompts.window, 2**20)) // 5
        inference.prompts.encoder = with_examples(plain, examples, room) if examples else plain
    if system.seed is not None:
        settings = settings | {"temperature": _TEMPERATURE, "seed": system.seed}
    notes = {number: row.clinical_note for number, row in rows.items()}
    since = time.perf_counter()
    for number, result in inference.summarize(notes, writing=system.writing, **settings):
        result["seconds"] = round(time.perf_counter() - since, 4)
        if system.model == "base":
            result["made_by"]["adapter"] = None
        if system.writing == "free" and system.seed is None:
            result["reference_loss"] = reference_loss(inference, rows[number])
            if system.model == "specialist":
                text = result["generated_summary"]
                result["model_support"] = sentence_support(inference, notes[number], text)
        yield number, result
        since = time.perf_counter()


def digest(*values) -> str:
    return hashlib.sha256(to_json(values).encode()).hexdigest()


def read_summaries(path: Path) -> dict[int, dict]:
    """{number: result} of what was written so far."""
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        file.readline()
        return {number: result for number, result, _ in read_results(file)}


def keep_summaries(path: Path, fingerprint: dict, results: Iterator, on_each: Callable | None) -> None:
    """Appends (number, result) pairs to a file of one fingerprint as they come."""
    out = PartialFile(path, fingerprint)
    try:
        for number, result in results:
            out.add(number, result)
            if on_each:
                on_each()
        out.sync()
    finally:
        out.close()
