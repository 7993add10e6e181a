"""What is compared: the systems, and their summaries, kept in a file each as they are written."""

import copy
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft.cli import Progress, Stopped, log, noted_signals, plural
from sft.data.dataset import SFTDataset, padded_batch
from sft.data.prompt import PromptEncoder, pad_token_id
from sft.data.rows import Row
from sft.files import make_private_dir
from sft.grounding.selector import fit_selector, quote
from sft.grounding.sentences import split_sentences
from sft.inference.note_files import PartialFile, read_results
from sft.inference.results import to_json


@dataclass(frozen=True)
class System:
    """`model`: "base", "specialist", or "" if no model writes; `writing`: how, as --writing says it."""

    name: str
    says: str
    model: str = ""
    needs_training_rows: bool = False
    writing: str = "free"


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
_N_FIRST = 8  # notes whose summaries tell how long all will take


def lead(note: str) -> str:
    sentences = split_sentences(note)
    return " ".join(sentences if len(sentences) <= 5 else sentences[:2] + sentences[-3:])


def write_without_model(name: str, rows: Mapping[int, Row], training: Sequence[Row]) -> dict[int, str]:
    """{number: summary} of a system that no model writes."""
    if name == "lead":
        return {number: lead(row.clinical_note) for number, row in rows.items()}
    if name == "reference":
        return {number: row.model_summary for number, row in rows.items()}
    if name == "commonest":
        [(summary, _)] = Counter(row.model_summary for row in training).most_common(1)
        return dict.fromkeys(rows, summary)
    selector = fit_selector((row.clinical_note, row.model_summary) for row in training)
    quoted = {number: quote(row.clinical_note, selector) for number, row in rows.items()}
    return {number: " ".join(sentence.text for sentence in found) for number, found in quoted.items()}


def remove_adapter(inference) -> None:
    """Makes the base model of an SFTInference that was loaded with `merge=False`: the adapter's layers go, in
    place, and the base's are packed for speed as the specialist's are."""
    import torch

    from sft.model.kernels import PackedLinear, has_onednn, replace_linear_layers

    inference.model = inference.model.unload()
    is_plain = not getattr(inference.model, "is_quantized", False)
    placement = inference.placement
    if is_plain and placement.dtype is torch.float32 and placement.device.type == "cpu" and has_onednn():
        replace_linear_layers(inference.model, PackedLinear)


def with_examples(encoder: PromptEncoder, rows: Sequence[Row], n_tokens: int, n: int = 2) -> PromptEncoder:
    """The same prompt after `n` rows as earlier turns, prompt and answer: those nearest to the median length,
    of different notes, with at most `n_tokens` each."""
    by_length = sorted({row.note_key: row for row in rows}.values(), key=lambda row: len(row.clinical_note))
    median = len(by_length[len(by_length) // 2].clinical_note)
    turns = []
    for row in sorted(by_length, key=lambda row: abs(len(row.clinical_note) - median)):
        texts = [encoder.template.render_note(row.clinical_note), row.model_summary]
        note_ids, summary_ids = encoder.encode_texts(texts)
        turn = [*encoder.prompt(note_ids), *summary_ids, encoder.template.end_token_id]
        turns += [turn] if len(turn) <= n_tokens else []
        if len(turns) == n:
            break
    else:
        log(f"warning: base_examples has {plural(len(turns), 'example')}: no other fits the context window")
    shown = copy.copy(encoder)
    shown.prefix_ids = [token for turn in turns for token in turn] + encoder.prefix_ids
    shown.n_template_tokens = len(shown.prefix_ids) + len(shown.suffix_ids)
    return shown


def reference_losses(inference, rows: Mapping[int, Row]) -> dict[int, tuple[float, int]]:
    """{number: (cross-entropy in nats summed over the reference summary and its end token, tokens)}; without
    rows that do not fit the model's context window."""
    import torch

    from sft.model.adapter import unwrap

    model = unwrap(inference.model)
    numbers = list(rows)
    window = int(min(inference.prompts.window, 2**20))
    dataset = SFTDataset(list(rows.values()), inference.prompts.encoder, window)
    losses = {}
    for index, example in zip(dataset.row_indices, dataset.examples):
        batch = padded_batch([example], pad_token_id(inference.tokenizer)).to(inference.placement.device)
        with torch.inference_mode():
            # The last logit predicts what follows the end token
            kept = model(**batch.inputs, logits_to_keep=example.n_target_tokens + 1).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(kept.float(), batch.targets, reduction="sum")
        losses[numbers[index]] = (loss.item(), example.n_target_tokens)
    return losses


def write_with_model(
    inference, system: System, rows: Mapping[int, Row], examples: Sequence[Row], settings: dict
) -> Callable:
    """A function of (numbers, should_stop) that yields (number, result). `examples`: rows for the prompt;
    `settings`: of summarize. Results of free writing have `reference_loss`, as of reference_losses."""

    def write(numbers: Sequence[int], should_stop: Callable[[], bool]) -> Iterator[tuple[int, dict]]:
        part = {number: rows[number] for number in numbers}
        if system.writing != "quote":
            inference.load()
            plain = inference.prompts.encoder
        if examples:
            room = int(min(inference.prompts.window, 2**20)) // 5
            inference.prompts.encoder = with_examples(plain, examples, room)
        losses = reference_losses(inference, part) if system.writing == "free" else {}
        notes = {number: row.clinical_note for number, row in part.items()}
        results = inference.summarize(notes, writing=system.writing, should_stop=should_stop, **settings)
        for number, result in results:
            if system.model == "base":
                result["made_by"]["adapter"] = None
            yield number, result | {"reference_loss": losses[number]} if number in losses else result
        if examples:
            inference.prompts.encoder = plain

    return write


def digest(*values) -> str:
    return hashlib.sha256(to_json(values).encode()).hexdigest()


class SystemFile:
    """A system's summaries: a file whose name has a hash of all that decides them, so that it is only
    ever continued, and never mistaken for another's. `results`: {number: result} so far."""

    def __init__(self, output_dir: Path, name: str, fingerprint: dict):
        self.name = name
        self.fingerprint = fingerprint
        self.path = output_dir / "summaries" / f"{name}-{digest(fingerprint)[:12]}.jsonl"
        self.results: dict[int, dict] = {}
        if self.path.is_file():
            with open(self.path, "rb") as file:
                file.readline()
                self.results = {number: result for number, result, _ in read_results(file)}

    def missing(self, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if number not in self.results]

    def write(self, numbers: Sequence[int], write: Callable, on_first: Callable | None = None) -> None:
        """Appends what is missing of `numbers` as `write(numbers, should_stop)` yields it, each with its
        `seconds`. `on_first(seconds a note)` is called after the first few. Raises Stopped after a signal."""
        missing = self.missing(numbers)
        if not missing:
            return
        make_private_dir(self.path.parent)
        out = PartialFile(self.path, self.fingerprint)
        progress = Progress(len(numbers), "note", done=len(numbers) - len(missing), interval=20)
        n_first = _N_FIRST if on_first else len(missing)
        try:
            with noted_signals("finished summaries are kept") as noted:
                for part in filter(None, (missing[:n_first], missing[n_first:])):
                    started = since = time.perf_counter()
                    for number, result in write(part, lambda: bool(noted)):
                        since, before = time.perf_counter(), since
                        self.results[number] = {**result, "seconds": round(since - before, 4)}
                        out.add(number, self.results[number])
                        progress.advance()
                    if noted:
                        raise Stopped(noted[0], f"stopped: the same command continues {self.name}")
                    if on_first and part[0] == missing[0]:
                        on_first((time.perf_counter() - started) / len(part))
            out.sync()
        finally:
            progress.close()
            out.close()
