"""Summaries from a trained adapter: one note, a file of notes, or a conversation.

python sft_inference.py --clinical_note "Patient reports fever of 38.5°C and cough."
python sft_inference.py --input_file notes.csv --output_file summaries.jsonl
python sft_inference.py                                   # interactive

from sft_inference import SFTInference
result = SFTInference("models/sft_specialist/final_model").generate_summary("Patient reports ...")

torch is imported when a model is loaded, not before, so that `--help` and input errors are instant.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

from sft import __version__
from sft.cli import InputError, RunError, as_input_error, is_terminal, log, run_script, visible
from sft.data.prompt import PromptEncoder, PromptTemplate
from sft.data.text import decode_bytes
from sft.grounding.sentences import sentence_spans
from sft.inference.chat import converse, log_result, note_terminal, print_piece, read_piped
from sft.inference.checks import check_files, fingerprint, is_conversation
from sft.inference.note_files import check_output, report, summarize_file
from sft.inference.notes import Note
from sft.inference.results import (
    FIXES,
    OUT_OF_MEMORY,
    failure,
    make_result,
    note_problem,
    read_note,
    text_stream,
    to_json,
)
from sft.model.folder import log_origin, log_quantization, quantization_for, read_adapter_folder
from sft.options import (
    DEFAULT_GENERATION_BATCH_SIZE,
    InferenceConfig,
    check_config,
    parse_options,
)

# ------------------------------------------------------------------------------- the specialist


class SFTInference:
    """A trained adapter on its base model, or a merged folder, ready to summarize. Threads that share one
    take turns.

    `quantization` is by default that of training. With `merge` (the default) the adapter is merged into a
    float32 base, whose weights are packed for speed on a CPU, or into 8-bit weights there; without it, and
    for other bases, `model` is the PeftModel as it was loaded. `max_length` limits the tokens of the prompt
    (None: the model's context window alone does, which holds prompt and summary). With `prompt_from`, a
    folder of ours, the adapter may be one that another tool trained further. All that decides a summary is
    verified; `verify` reads weights again that look unchanged.
    Raises InputError if the folder, the base model or the device cannot be used."""

    def __init__(
        self,
        model_path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        *,
        base_model: str | None = None,
        quantization: str = "auto",
        use_8bit: bool = False,
        use_4bit: bool = False,
        max_length: int | None = None,
        merge: bool = True,
        prompt_from: str | Path | None = None,
        verify: bool = False,
    ):
        bits = {"quantization": quantization, "use_8bit": use_8bit, "use_4bit": use_4bit}
        given = {"model_path": model_path, "base_model": base_model, "prompt_from": prompt_from}
        check_config(InferenceConfig(**given, **bits, dtype=dtype, max_length=max_length))
        folder, self.sft_config, adapter_config = read_adapter_folder(model_path, prompt_from, verify=verify)
        log_origin(folder, self.sft_config, prompt_from)
        quantization = quantization_for(bits, self.sft_config)
        log_quantization(quantization, self.sft_config)
        with as_input_error(f"{folder}: its configuration lacks the prompt", "train again"):
            self.template = PromptTemplate.from_dict(self.sft_config["prompt"])

        from sft.model.adapter import load_specialist
        from sft.model.base import pick_device
        from sft.model.kernels import has_int8, pack_for_inference
        from sft.model.merged import merge_for_inference

        self.placement = pick_device(device, dtype)
        # Faster and more exact than bitsandbytes on a CPU, but the adapter has to be merged
        if quantization == "8bit" and merge and self.placement.device.type == "cpu" and has_int8():
            quantization = "int8"
        self.model, self.tokenizer = load_specialist(
            folder,
            self.sft_config,
            adapter_config,
            self.placement,
            quantization=quantization,
            base_model=base_model,
            tokenizer_folder=None if prompt_from is None else Path(prompt_from),
            verify=verify,
        )
        self.quantization = quantization
        self.encoder = PromptEncoder(self.tokenizer, self.template)
        self._read_limits(max_length)
        if merge:
            self.model = merge_for_inference(self.model, quantization, self.placement.dtype)
            pack_for_inference(self.model)
        self._choose_decoder()
        self._turn = threading.Lock()
        self._owner: int | None = None  # the thread whose turn it is

    def _read_limits(self, max_length: int | None) -> None:
        """Sets `window` (tokens of prompt and summary together), `longest_prompt` and `stop_ids`."""
        from transformers import GenerationConfig

        from sft.model.adapter import unwrap
        from sft.model.base import context_window

        base = unwrap(self.model)
        self.window = context_window(base) or math.inf
        self.longest_prompt = max_length or math.inf
        own_stops = base.generation_config.eos_token_id
        if not isinstance(own_stops, list):
            own_stops = [] if own_stops is None else [own_stops]
        self.stop_ids = sorted({*self.template.stop_token_ids, *own_stops})
        # A model's own sampling settings must not leak in
        base.generation_config = GenerationConfig()
        base.config.use_cache = True

    def save_merged(self, folder: str | Path) -> None:
        """Writes base model and adapter as one model (see sft.model.merged), from a specialist that was
        loaded with `merge=False`; `model` is then the merged one."""
        from sft.model.merged import save_merged

        def encode(note: str) -> list[int]:
            return self.encoder.prompt(self.encoder.encode_texts([note])[0])

        self.model = save_merged(
            self.model, self.tokenizer, self.stop_ids, Path(folder), self.sft_config, encode
        )

    def _choose_decoder(self) -> None:
        """Sets `decoder` once and for all, before any thread uses the model."""
        from sft.inference.decoding import decode, enable_kv_cache
        from sft.inference.endings import number_ids
        from sft.inference.generate import decode_apart, decode_with_generate
        from sft.model.adapter import unwrap
        from sft.model.probes import longest_shared

        self._base = unwrap(self.model)
        self._numbers = number_ids(self.tokenizer)
        fits, reason = enable_kv_cache(self._base)
        self.decoder = decode if fits else decode_with_generate
        if not fits:
            log(f"info: using transformers' generate(), which is slower than the built-in decoder: {reason}")
        limit = longest_shared(self._base, self.window)
        if limit < self.window:
            self.decoder = functools.partial(decode_apart, self.decoder, limit)

    def generate_summary(
        self,
        clinical_note: str,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        *,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> dict:
        """The summary of one note. `max_new_tokens` is by default what training summaries needed;
        `temperature` 0 is greedy and always the same; `on_text` gets the text as it is written, also what is
        then cut off.

        Returns a dict: `generated_summary`; `evidence` (its citations, see
        sft.grounding.citations.parse_citations); `confidence` (0 to 1: the geometric mean of the
        probabilities the model gave to the tokens it wrote; how sure it was of its words, not whether they
        are true); `warnings` (list of str); `n_prompt_tokens`; `n_new_tokens` (with the end token);
        `finish_reason` ("stop", "length" if max_new_tokens cut it, or "loop" if it repeated itself);
        `made_by` (see `made_by`).

        Raises InputError for an empty note, RunError if memory runs out or the model computes NaN, and what
        `on_text` raises.
        """
        problem = note_problem(clinical_note)
        if problem:
            raise InputError(problem, "pass a note with text")
        on_text_of = (lambda _, text: on_text(text)) if on_text else None
        results = self.summarize(
            {0: clinical_note}, max_new_tokens, temperature, batch_size=1, seed=seed, on_text=on_text_of
        )
        result = dict(results)[0]
        if "error" in result:
            raise RunError(result["error"], FIXES.get(result["error"], ""))
        return result

    def generate_batch(
        self,
        clinical_notes: Iterable[str],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        *,
        batch_size: int = DEFAULT_GENERATION_BATCH_SIZE,
        seed: int = 0,
    ) -> list[dict]:
        """The results of many notes, in their order: those of `summarize` for notes numbered from 0. Takes a
        list, a generator ...: whatever gives the notes themselves, in an order; of a DataFrame its column
        clinical_note."""
        if "clinical_note" in getattr(clinical_notes, "columns", ()):
            clinical_notes = clinical_notes["clinical_note"]
        # Letters, keys or column names would be taken for notes
        has_others = isinstance(clinical_notes, str | bytes | Mapping | Set) or hasattr(
            clinical_notes, "columns"
        )
        if has_others or not isinstance(clinical_notes, Iterable):
            fix = 'pass the notes in their order: [note], df["clinical_note"], or list(notes.values())'
            raise InputError(f"clinical_notes is a {type(clinical_notes).__name__}, not a list of notes", fix)
        notes = dict(enumerate(clinical_notes))
        results = dict(self.summarize(notes, max_new_tokens, temperature, batch_size=batch_size, seed=seed))
        return [results[number] for number in notes]

    def summarize(
        self,
        notes: Mapping[int, object],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        *,
        batch_size: int = DEFAULT_GENERATION_BATCH_SIZE,
        seed: int = 0,
        on_text: Callable[[int, str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, dict]]:
        """Yields (number, result) of numbered notes as their summaries end; results as of `generate_summary`.

        Greedy summaries are the same as one by one; sampled ones depend on the seed and the note's number,
        not on its neighbors. A note that cannot be summarized gets a dict with `error` and an empty
        `generated_summary`. `on_text` gets (number, text) as summaries are written. Once `should_stop()`,
        asked after each forward pass, is true, the generator ends without the summaries that are not
        finished.

        Until the generator is used up or closed, other threads' calls wait, and one from the thread that is
        iterating is an InputError, as are settings that fit no note. Raises RunError if the model fails for
        another reason than memory."""
        max_new_tokens = self.sft_config["max_new_tokens"] if max_new_tokens is None else max_new_tokens
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        check_config(InferenceConfig(**settings, batch_size=batch_size))
        from sft.inference.decoding import decode_within_memory

        made_by = {"made_by": self.made_by(**settings)}
        with self._own_turn():
            texts = {}
            prompts = {}
            warnings = {}
            for number, note in notes.items():
                problem = note_problem(note)
                if problem:
                    yield number, failure(problem) | made_by
                else:
                    texts[number], odd = read_note(note, self.sft_config.get("language"))
                    prompts[number], warnings[number] = self.prompt_ids(texts[number], max_new_tokens)
                    warnings[number] += odd
            sequences = decode_within_memory(
                functools.partial(self.decoder, self._base),
                prompts,
                max_new_tokens,
                self.stop_ids,
                temperature=temperature,
                seed=seed,
                numbers=self._numbers,
                batch_size=batch_size,
                on_token=text_stream(self.tokenizer, self.stop_ids, on_text) if on_text else None,
                should_stop=should_stop,
            )
            version = self.template.sentence_version
            for number, sequence in sequences:
                if sequence is None:
                    yield number, failure(OUT_OF_MEMORY) | made_by
                else:
                    result = make_result(texts[number], sequence, self.tokenizer, warnings[number], version)
                    yield number, result | made_by

    @contextlib.contextmanager
    def _own_turn(self) -> Iterator[None]:
        """Model and tokenizer for this thread alone, once others are done. Raises InputError where it would
        wait for itself."""
        if self._owner == threading.get_ident():
            fix = "collect the results first: list(inference.summarize(...)); in on_text, only note the text"
            raise InputError("a call from inside the loop or the on_text of another call", fix)
        with self._turn:
            self._owner = threading.get_ident()
            try:
                yield
            finally:
                self._owner = None

    def made_by(self, max_new_tokens: int, temperature: float, seed: int) -> dict:
        """What a summary was made by: all that decides it, without paths or text. `adapter` is the beginning
        of one hash over the adapter folder's files."""
        return {
            "adapter": self.sft_config["sha256"]["folder"][:12],
            "prompt_from": self.sft_config.get("prompt_from"),
            "toolkit": __version__,
            "dtype": self.quantization or self.placement.dtype_name,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }

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

    def prompt_ids(self, note: str, max_new_tokens: int) -> tuple[list[int], list[str]]:
        """(token ids of the prompt, warnings). A note too long for the model is shortened at a sentence
        boundary. Raises InputError if there is no room for a note."""
        limit = self.max_note_tokens(max_new_tokens)
        warnings = []
        note_ids = None
        # A token of text rarely has 100 characters: of an enormous note only the beginning is tokenized
        if len(note) <= limit * 100:
            note_ids = self.encoder.encode_texts([self.template.render_note(note)])[0]
        if note_ids is None or len(note_ids) > limit:
            note_ids, n_kept = self.encoder.shorten(note, limit)
            n_sentences = len(sentence_spans(note, self.template.sentence_version))
            kept = f"its first {n_kept} of {n_sentences} sentences"
            if n_kept == 0:
                kept = "the beginning of its first sentence"
            option, why, _ = self._reason_for_limit(max_new_tokens)
            warnings.append(f"note shortened: only {kept} fit with {option} ({why})")
        ids = self.encoder.prompt(note_ids)
        trained = self.sft_config["max_length"]
        if trained and len(ids) > trained:
            warnings.append(
                f"prompt longer than any in training: {len(ids)} tokens, trained on up to {trained}"
            )
        return ids, warnings


# ------------------------------------------------------------------------------- command line


def write_file(inference: SFTInference, notes: Sequence[Note], config: InferenceConfig) -> None:
    """Summarizes all notes of input_file. Raises what `summarize_file` does."""
    # Raises before a file is created if there is no room for any note
    inference.max_note_tokens(config.max_new_tokens)
    settings = {name: getattr(config, name) for name in "max_new_tokens temperature batch_size seed".split()}
    summarize = functools.partial(inference.summarize, **settings)
    summarize_file(notes, config, fingerprint(config, inference.sft_config, notes), summarize)


def write_summary(inference: SFTInference, config: InferenceConfig) -> None:
    """Summarizes clinical_note to standard output, as it is written if that is a terminal."""
    started = time.perf_counter()
    streams = not config.json and sys.stdout.isatty()
    result = inference.generate_summary(
        config.clinical_note,
        config.max_new_tokens,
        config.temperature,
        seed=config.seed,
        on_text=print_piece if streams else None,
    )
    if config.json:
        print(to_json(result, sys.stdout), flush=True)
    else:
        print("" if streams else visible(result["generated_summary"], sys.stdout), flush=True)
    log_result(result, time.perf_counter() - started)


def load_inference(config: InferenceConfig) -> SFTInference:
    from sft.model.base import device_of_process

    names = "model_path dtype base_model quantization use_8bit use_4bit max_length prompt_from verify".split()
    return SFTInference(
        device=device_of_process(config.device),
        merge=not (config.no_merge or config.merge_to),
        **{name: getattr(config, name) for name in names},
    )


def write_merged(config: InferenceConfig) -> None:
    """Writes the merged folder, with the full base model, and says what that changed."""
    from sft.model.merged import probe_loss

    inference = load_inference(config)
    before = probe_loss(inference.model, inference.encoder)
    if trained := inference.quantization:
        inference = load_inference(dataclasses.replace(config, quantization="none"))
    inference.save_merged(config.merge_to)
    after = probe_loss(inference.model, inference.encoder)
    as_trained = f"as trained, with the base model in {trained}" if trained else "unmerged"
    losses = f"loss on three short made-up notes {after:.4f} merged, {before:.4f} {as_trained}"
    log(f"Saved the merged model to {config.merge_to}: {losses}")


def main() -> None:
    description = (
        "Summarizes clinical notes with a trained adapter: one note, a file, or interactively. "
        "With neither --clinical_note nor --input_file, starts an interactive session."
    )
    config = parse_options(InferenceConfig, description)
    notes = check_files(config)
    sft_config = read_adapter_folder(config.model_path, config.prompt_from)[1]
    config.max_new_tokens = config.max_new_tokens or sft_config["max_new_tokens"]
    if config.output_file:
        belongs_to = functools.partial(fingerprint, config, sft_config, notes)
        counts = check_output(config.output_file, config.resume, belongs_to)
        if counts is not None:
            log(f"{config.output_file} exists and is complete: nothing to do")
            return report(counts, "", Path(config.output_file), config.fail_on_error)
    if config.clinical_note == "-":
        config.clinical_note = decode_bytes(sys.stdin.buffer.read(), "standard input")
    if config.clinical_note is not None and note_problem(config.clinical_note):
        raise InputError("--clinical_note is empty", "pass a note with text")
    piped = None
    if is_conversation(config) and not is_terminal(sys.stdin):
        piped = read_piped(config.one_note)
    from sft.model.base import own_settings

    with own_settings(), note_terminal(is_conversation(config)):
        if config.merge_to:
            return write_merged(config)
        inference = load_inference(config)
        if notes is not None:
            write_file(inference, notes, config)
        elif config.clinical_note is not None:
            write_summary(inference, config)
        else:
            converse(inference.generate_summary, config, piped)


if __name__ == "__main__":
    run_script(main)
