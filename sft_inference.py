"""Summaries from a trained adapter: one note, a file of notes, or a conversation.

python sft_inference.py --clinical_note "Patient reports fever of 38.5°C and cough."
python sft_inference.py --input_file notes.csv --output_file summaries.jsonl
python sft_inference.py                                   # interactive

from sft_inference import SFTInference
result = SFTInference("models/sft_specialist/final_model").generate_summary("Patient reports ...")

torch is imported when a model is loaded, not before, so that `--help` and input errors are instant.
"""

import functools
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from sft import __version__
from sft.cli import InputError, RunError, as_input_error, log, processes, run_script
from sft.data.prompt import PromptEncoder, PromptTemplate
from sft.data.text import clean_text, decode_bytes
from sft.files import check_new_file, sha256
from sft.grounding.sentences import sentence_spans
from sft.inference.chat import converse, log_result, print_piece
from sft.inference.note_files import Notes, check_output, read_notes, summarize_file
from sft.inference.results import failure, make_result, note_problem, text_stream
from sft.model.folder import log_origin, read_adapter_folder
from sft.options import (
    DEFAULT_GENERATION_BATCH_SIZE,
    DEFAULT_MAX_NEW_TOKENS,
    InferenceConfig,
    parse_options,
    quantization_of,
)

# ------------------------------------------------------------------------------- the specialist


class SFTInference:
    """A trained adapter on its base model, or a merged folder, ready to summarize. Threads that share one
    take turns.

    With `merge` (the default) the adapter is merged into a float32 base, whose weights are packed for speed
    on a CPU, or into 8-bit weights there (`use_8bit`); without it, and for other bases, `model` is the
    PeftModel as it was loaded. `max_length` limits the tokens of prompt and summary together (None: the
    model's context window). With `prompt_from`, a folder of ours, the adapter may be one that another tool
    trained further. All that decides a summary is verified; `verify` reads weights again that look unchanged.
    Raises InputError if the folder, the base model or the device cannot be used."""

    def __init__(
        self,
        model_path: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        *,
        base_model: str | None = None,
        use_8bit: bool = False,
        use_4bit: bool = False,
        max_length: int | None = None,
        merge: bool = True,
        prompt_from: str | Path | None = None,
        verify: bool = False,
    ):
        quantization = quantization_of(use_8bit, use_4bit)
        folder, self.sft_config, adapter_config = read_adapter_folder(model_path, prompt_from, verify=verify)
        log_origin(folder, self.sft_config, prompt_from)
        with as_input_error(f"{folder}: its configuration lacks the prompt", "train again"):
            self.template = PromptTemplate.from_dict(self.sft_config["prompt"])

        from sft.model.adapter import load_specialist
        from sft.model.base import pick_device
        from sft.model.kernels import has_int8

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
        self._quantization = quantization
        self.encoder = PromptEncoder(self.tokenizer, self.template)
        self._read_limits(max_length)
        if merge:
            self._merge(quantization)
        self._choose_decoder()
        self._turn = threading.Lock()

    def _read_limits(self, max_length: int | None) -> None:
        """Sets `window` (tokens of prompt and summary together) and `stop_ids`."""
        from transformers import GenerationConfig

        from sft.model.adapter import unwrap
        from sft.model.base import context_window

        base = unwrap(self.model)
        self.window = min(context_window(base) or math.inf, max_length or math.inf)
        own_stops = base.generation_config.eos_token_id
        if not isinstance(own_stops, list):
            own_stops = [] if own_stops is None else [own_stops]
        self.stop_ids = sorted({*self.template.stop_token_ids, *own_stops})
        # A model's own sampling settings must not leak in
        base.generation_config = GenerationConfig()
        base.config.use_cache = True

    def _merge(self, quantization: str | None) -> None:
        import torch

        from sft.model.adapter import merge_into_int8
        from sft.model.kernels import PackedLinear, has_onednn, replace_linear_layers

        if quantization == "int8":
            self.model = merge_into_int8(self.model, self.placement.dtype)
        # Merged into 16 bits or fewer, some of the adapter would be rounded away
        elif not quantization and self.placement.dtype is torch.float32:
            if "merged" not in self.sft_config:
                self.model = self.model.merge_and_unload()
            if self.placement.device.type == "cpu" and has_onednn():
                replace_linear_layers(self.model, PackedLinear)

    def save_merged(self, folder: str | Path) -> None:
        """Writes base model and adapter as one model (see sft.model.merged), from a specialist that was
        loaded with `merge=False`; it is used up."""
        from sft.model.merged import save_merged

        def encode(note: str) -> list[int]:
            return self.encoder.prompt(self.encoder.encode_texts([note])[0])

        save_merged(self.model, self.tokenizer, self.stop_ids, Path(folder), self.sft_config, encode)

    def _choose_decoder(self) -> None:
        """Sets `decoder` once and for all, before any thread uses the model."""
        from sft.inference.decoding import decode, enable_kv_cache
        from sft.inference.generate import decode_with_generate
        from sft.model.adapter import unwrap

        self._base = unwrap(self.model)
        fits, reason = enable_kv_cache(self._base)
        self.decoder = decode if fits else decode_with_generate
        if not fits:
            log(f"info: using transformers' generate(), which is slower than the built-in decoder: {reason}")

    def generate_summary(
        self,
        clinical_note: str,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        *,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> dict:
        """The summary of one note. `temperature` 0 is greedy and always the same; `on_text` gets the text as
        it is written.

        Returns a dict: `generated_summary`; `evidence` (its citations, see
        sft.grounding.citations.parse_citations); `confidence` (0 to 1: the geometric mean of the
        probabilities the model gave to the tokens it wrote; how sure it was of its words, not whether they
        are true); `warnings` (list of str); `n_prompt_tokens`; `n_new_tokens` (with the end token);
        `finish_reason` ("stop", or "length" if max_new_tokens cut it); `made_by` (see `made_by`).

        Raises InputError for an empty note, RunError if memory runs out.
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
            raise RunError(result["error"], "lower --max_length or use --use_4bit")
        return result

    def generate_batch(
        self,
        clinical_notes: Sequence[str],
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        *,
        batch_size: int = DEFAULT_GENERATION_BATCH_SIZE,
        seed: int = 0,
    ) -> list[dict]:
        """The results of many notes, in their order: those of `summarize` for notes numbered from 0."""
        if isinstance(clinical_notes, str):
            fix = "pass a list of notes, or call generate_summary"
            raise InputError("clinical_notes is a single string", fix)
        notes = dict(enumerate(clinical_notes))
        results = dict(self.summarize(notes, max_new_tokens, temperature, batch_size=batch_size, seed=seed))
        return [results[number] for number in notes]

    def summarize(
        self,
        notes: Mapping[int, object],
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
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

        Until the generator is used up or closed, other calls wait; do not call from the thread that is
        iterating. Raises InputError for settings that fit no note, RunError if the model fails for another
        reason than memory."""
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more, not {batch_size}")
        if max_new_tokens < 1 or not 0 <= temperature < math.inf:
            problem = "max_new_tokens must be 1 or more; temperature must be a finite number, 0 or more"
            raise InputError(problem)
        from sft.inference.decoding import decode_within_memory

        # The tokenizer cannot be shared between threads either
        with self._turn:
            texts = {}
            prompts = {}
            warnings = {}
            for number, note in notes.items():
                problem = note_problem(note)
                if problem:
                    yield number, failure(problem)
                else:
                    texts[number] = clean_text(note)
                    prompts[number], warnings[number] = self.prompt_ids(texts[number], max_new_tokens)
            sequences = decode_within_memory(
                functools.partial(self.decoder, self._base, temperature=temperature, seed=seed),
                prompts,
                max_new_tokens,
                self.stop_ids,
                batch_size=batch_size,
                on_token=text_stream(self.tokenizer, self.stop_ids, on_text) if on_text else None,
                should_stop=should_stop,
            )
            for number, sequence in sequences:
                if sequence is None:
                    yield number, failure("out of memory on this note")
                else:
                    result = self._result(texts[number], sequence, warnings[number])
                    yield number, result | {"made_by": self.made_by(max_new_tokens, temperature, seed)}

    def made_by(self, max_new_tokens: int, temperature: float, seed: int) -> dict:
        """What a summary was made by: all that decides it, without paths or text. `adapter` is the beginning
        of one hash over the adapter folder's files."""
        return {
            "adapter": self.sft_config["sha256"]["folder"][:12],
            "prompt_from": self.sft_config.get("prompt_from"),
            "toolkit": __version__,
            "dtype": self._quantization or self.placement.dtype_name,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
        }

    def max_note_tokens(self, max_new_tokens: int) -> float:
        """How many tokens a note may have. Raises InputError if none."""
        limit = self.window - max_new_tokens - self.encoder.n_template_tokens
        if limit < 1:
            problem = f"--max_new_tokens {max_new_tokens} leaves no room for a note"
            limits = f"prompt and summary together may have at most {self.window} tokens"
            fix = "lower --max_new_tokens, or raise --max_length if you set it"
            raise InputError(f"{problem}: {limits}", fix)
        return limit

    def prompt_ids(self, note: str, max_new_tokens: int) -> tuple[list[int], list[str]]:
        """(token ids of the prompt, warnings). A note too long for the model is shortened at a sentence
        boundary. Raises InputError if max_new_tokens leaves no room for a note."""
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
            warnings.append(f"note shortened: only {kept} fit {self.window} tokens")
        ids = self.encoder.prompt(note_ids)
        longest_trained = self.sft_config["max_length"]
        if longest_trained and len(ids) > longest_trained:
            warnings.append(f"prompt of {len(ids)} tokens: longer than any in training ({longest_trained})")
        return ids, warnings

    def _result(self, note: str, sequence, prompt_warnings: list[str]) -> dict:
        n_end_tokens = 1 if sequence.finish_reason == "stop" else 0
        ids = sequence.ids[: len(sequence.ids) - n_end_tokens]
        summary = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return make_result(note, summary, sequence, prompt_warnings, self.template.sentence_version)


# ------------------------------------------------------------------------------- command line


def check_files(config: InferenceConfig) -> Notes | None:
    """The notes of input_file, once it is clear that they can be read and their summaries written. Raises
    InputError for options that contradict each other."""
    if config.clinical_note is not None and config.input_file:
        raise InputError("--clinical_note cannot be combined with --input_file", "choose one")
    if config.output_file and not config.input_file:
        fix = "add --input_file with the notes; one note's summary goes to standard output"
        raise InputError("--output_file requires --input_file", fix)
    if config.merge_to and (config.clinical_note is not None or config.input_file):
        problem = "--merge_to cannot be combined with --clinical_note or --input_file"
        raise InputError(problem, "merge first, then summarize")
    if config.resume and not config.output_file:
        raise InputError("--resume requires --output_file", "specify the file to continue with --output_file")
    if processes()[1] > 1 and not config.output_file:
        problem = "running several processes requires --input_file and --output_file"
        raise InputError(problem, "add both, or start one process")
    if config.merge_to and (config.use_8bit or config.use_4bit):
        problem = "--merge_to cannot be combined with --use_8bit or --use_4bit"
        raise InputError(problem, "merge into the unquantized base model, then quantize")
    check_new_file("--merge_to", config.merge_to)
    if not config.input_file:
        return None
    notes = list(read_notes(config.input_file))
    if not notes:
        raise InputError(f"{config.input_file}: no notes in it", "check the file")
    return notes


def fingerprint(config: InferenceConfig, sft_config: dict) -> dict:
    """What two runs must share for their files of summaries to be the same: hashes and settings, no text."""
    from sft.model.base import pick_device

    names = "max_new_tokens temperature seed max_length batch_size no_merge use_8bit use_4bit".split()
    return {
        "input_file": sha256(Path(config.input_file)),
        "adapter": sft_config["sha256"]["folder"],
        "base model": sft_config["sha256"]["base_weights"],
        "typed base model": config.base_model if config.prompt_from else None,
        "dtype": str(pick_device(config.device, config.dtype).dtype),
        **{name: getattr(config, name) for name in names},
    }


def write_file(inference: SFTInference, notes: Notes, config: InferenceConfig) -> None:
    """Summarizes all notes of input_file. Raises Stopped after SIGTERM or Ctrl-C."""
    # Raises before a file is created if max_new_tokens leaves no room for any note
    inference.max_note_tokens(config.max_new_tokens)
    summarize = functools.partial(
        inference.summarize,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    summarize_file(notes, config, fingerprint(config, inference.sft_config), summarize)


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
        print(json.dumps(result, ensure_ascii=False), flush=True)
    else:
        print("" if streams else result["generated_summary"], flush=True)
    log_result(result, time.perf_counter() - started)


def load_inference(config: InferenceConfig) -> SFTInference:
    from sft.model.base import device_of_process

    config.device = device_of_process(config.device)
    return SFTInference(
        config.model_path,
        config.device,
        config.dtype,
        base_model=config.base_model,
        use_8bit=config.use_8bit,
        use_4bit=config.use_4bit,
        max_length=config.max_length,
        merge=not (config.no_merge or config.merge_to),
        prompt_from=config.prompt_from,
        verify=config.verify,
    )


def main() -> None:
    description = (
        "Summarizes clinical notes with a trained adapter: one note, a file, or interactively. "
        "With neither --clinical_note nor --input_file, starts an interactive session."
    )
    config = parse_options(InferenceConfig, description)
    notes = check_files(config)
    sft_config = read_adapter_folder(config.model_path, config.prompt_from)[1]
    if config.output_file:
        is_complete = check_output(
            config.output_file, config.resume, functools.partial(fingerprint, config, sft_config)
        )
        if is_complete:
            return log(f"{config.output_file} exists and is complete: nothing to do")
    if config.clinical_note == "-":
        config.clinical_note = decode_bytes(sys.stdin.buffer.read(), "standard input")
    if config.clinical_note is not None and note_problem(config.clinical_note):
        raise InputError("--clinical_note is empty", "pass a note with text")
    inference = load_inference(config)
    if config.merge_to:
        inference.save_merged(config.merge_to)
        log(f"Saved the merged model to {config.merge_to}")
    elif notes is not None:
        write_file(inference, notes, config)
    elif config.clinical_note is not None:
        write_summary(inference, config)
    else:
        converse(inference.generate_summary, config)


if __name__ == "__main__":
    run_script(main)
