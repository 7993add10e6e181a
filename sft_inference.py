"""Summaries from a trained adapter: one note, a file of notes, a conversation, or a server.

python sft_inference.py --clinical_note "Patient reports fever of 38.5°C and cough."
python sft_inference.py --input_file notes.csv --output_file summaries.jsonl
python sft_inference.py                                   # interactive
python sft_inference.py --serve 8000

from sft_inference import SFTInference
result = SFTInference("models/sft_specialist/final_model").generate_summary("Patient reports ...")

torch is imported when a model is loaded, not before, so that `--help` and input errors are instant."""

import contextlib
import dataclasses
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from sft import __version__
from sft.cli import InputError, RunError, as_input_error, is_terminal, log, run_script
from sft.data.prompt import PromptEncoder, PromptTemplate
from sft.inference.chat import converse, note_terminal, read_one_note, read_piped, write_summary
from sft.inference.checks import (
    check_files,
    fingerprint,
    import_libraries,
    is_conversation,
    log_idle_options,
)
from sft.inference.note_files import check_output, report, summarize_file
from sft.inference.notes import as_notes
from sft.inference.prompts import NotePrompts
from sft.inference.results import FIXES, failure, note_problem, read_note, text_stream
from sft.inference.writing import ask_specialist, way_of_writing, write_by_sentence, write_freely
from sft.model.folder import log_origin, log_quantization, quantization_for, read_adapter_folder
from sft.options import (
    DEFAULT_GENERATION_BATCH_SIZE,
    InferenceConfig,
    check_config,
    check_value,
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

    `writing` is "verified", "quote" or "free" (None: the adapter's default); for "quote" no model is loaded
    until a call asks for another way, or `load()`. With `citations`, and always for adapters trained on
    them, quoted and verified sentences cite the note's. Raises InputError for what cannot be used."""

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
        writing: str | None = None,
        citations: bool = False,
    ):
        bits = {"quantization": quantization, "use_8bit": use_8bit, "use_4bit": use_4bit}
        given = {"model_path": model_path, "base_model": base_model, "prompt_from": prompt_from}
        given |= {"verify": verify, "writing": writing, "citations": citations, "max_length": max_length}
        check_config(InferenceConfig(**given, **bits, dtype=dtype))
        check_value("merge", merge, bool, {})
        folder, self.sft_config, adapter_config = read_adapter_folder(model_path, prompt_from, verify=verify)
        log_origin(folder, self.sft_config, prompt_from)
        with as_input_error(f"{folder}: its configuration lacks the prompt", "train again"):
            self.template = PromptTemplate.from_dict(self.sft_config["prompt"])
        self.writing = way_of_writing(writing, self.sft_config, citations)
        self.citations = citations or self.template.number_sentences
        self.quantization = quantization_for(bits, self.sft_config)
        self._turn = threading.Lock()
        self._owner: int | None = None  # the thread whose turn it is
        options = {"base_model": base_model, "verify": verify}
        options["tokenizer_folder"] = None if prompt_from is None else Path(prompt_from)
        self._load = functools.partial(self._load_now, folder, adapter_config, merge, max_length, options)
        self._place = (device, dtype)
        if self.writing != "quote":
            self.load()

    def load(self) -> None:
        """Loads the model, if that is still to be done; other threads' calls wait."""
        if self._load:
            with self._own_turn():
                self._load_once()

    def _load_once(self) -> None:
        """The same, for whoever has the turn."""
        if self._load:
            import_libraries()
            self._load()
            self._load = None

    def _load_now(
        self, folder: Path, adapter_config: dict, merge: bool, max_length: int | None, options: dict
    ) -> None:
        """Sets all that belongs to the model; `options` are load_specialist's."""
        from sft.inference.endings import number_ids
        from sft.model.adapter import load_specialist, unwrap
        from sft.model.base import context_window, pick_device
        from sft.model.kernels import has_int8, pack_for_inference
        from sft.model.merged import merge_for_inference

        log_quantization(self.quantization, self.sft_config)
        self.placement = pick_device(*self._place)
        # Faster and more exact than bitsandbytes on a CPU, but the adapter has to be merged
        if self.quantization == "8bit" and merge and self.placement.device.type == "cpu" and has_int8():
            self.quantization = "int8"
        options = {**options, "quantization": self.quantization}
        self.model, self.tokenizer = load_specialist(
            folder, self.sft_config, adapter_config, self.placement, **options
        )
        base = unwrap(self.model)
        self.encoder = PromptEncoder(self.tokenizer, self.template)
        window = context_window(base.config) or math.inf
        self.prompts = NotePrompts(
            self.encoder, window, max_length or math.inf, self.sft_config["max_length"]
        )
        own_stops = base.generation_config.eos_token_id or []
        own_stops = own_stops if isinstance(own_stops, list) else [own_stops]
        self.stop_ids = sorted({*self.template.stop_token_ids, *own_stops})
        self._numbers = number_ids(self.tokenizer)
        # A model's own sampling settings must not leak in
        base.generation_config = type(base.generation_config)()
        base.config.use_cache = True
        if merge:
            self.model = merge_for_inference(self.model, self.quantization, self.placement.dtype)
            pack_for_inference(self.model)
        self._base = unwrap(self.model)
        self._choose_decoder()

    def _choose_decoder(self) -> None:
        """Sets `decoder` once and for all, before any thread uses the model."""
        from sft.inference.decoding import decode, enable_kv_cache
        from sft.inference.generate import decode_apart, decode_with_generate
        from sft.model.probes import longest_shared

        fits, reason = enable_kv_cache(self._base)
        self.decoder = decode if fits else decode_with_generate
        if not fits:
            log(f"info: using transformers' generate(), which is slower than the built-in decoder: {reason}")
        limit = longest_shared(self._base, self.prompts.window)
        if limit < self.prompts.window:
            self.decoder = functools.partial(decode_apart, self.decoder, limit)

    def save_merged(self, folder: str | Path) -> None:
        """Writes base model and adapter as one model (see sft.model.merged), from a specialist that was
        loaded with `merge=False`; `model` is then the merged one."""
        from sft.model.merged import save_merged

        self.load()

        def encode(note: str) -> list[int]:
            return self.encoder.prompt(self.encoder.encode_texts([note])[0])

        self.model = save_merged(
            self.model, self.tokenizer, self.stop_ids, Path(folder), self.sft_config, encode
        )

    def generate_summary(
        self,
        clinical_note: str,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        *,
        writing: str | None = None,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> dict:
        """The summary of one note. `max_new_tokens` is by default what training summaries needed;
        `temperature` 0 is greedy and always the same; `on_text` gets the text as it is written, also what is
        then cut off, or sentence by sentence: as NoteWords, a str, what is the note's own.

        Returns a dict: `generated_summary`; `sentences` (of quoted and verified ones: `text`, `source`
        "written" or "quoted", `note_sentences`, `confidence`, `refused`: why the model's own was not taken);
        `not_mentioned` (what the note holds and the summary lacks: `kind`, `text`, `note_sentence`);
        `evidence` (its citations, see sft.grounding.citations.parse_citations); `check_score`, `check_risk`,
        `findings`, `n_findings` and `support` (see sft.inference.results.check_result); `confidence` (0 to
        1: the geometric mean of the probabilities the model gave to the tokens it wrote; how sure it was of
        its words, not whether they are true; None if it wrote none); `warnings` (list of str);
        `n_prompt_tokens`; `n_new_tokens` (with the end tokens); `finish_reason` ("stop", "length" if
        max_new_tokens cut it, or "loop" if it repeated itself; a verified sentence that does not end by
        itself is quoted); `made_by` (see `made_by`).

        Raises InputError for an empty note, RunError if memory runs out or the model computes NaN, and what
        `on_text` raises."""
        problem = note_problem(clinical_note)
        if problem:
            raise InputError(problem, "pass a note with text")
        tell = (lambda _, text: on_text(text)) if on_text else None
        results = self.summarize(
            {0: clinical_note}, max_new_tokens, temperature, writing=writing, seed=seed, on_text=tell
        )
        [(_, result)] = results
        if "error" in result:
            raise RunError(result["error"], FIXES.get(result["error"], ""))
        return result

    def generate_batch(
        self,
        clinical_notes: Iterable[str],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        *,
        writing: str | None = None,
        batch_size: int = DEFAULT_GENERATION_BATCH_SIZE,
        seed: int = 0,
    ) -> list[dict]:
        """The results of many notes, in their order: those of `summarize` for notes numbered from 0. Takes a
        list, a generator ...: whatever gives the notes themselves, in an order; of a DataFrame its column
        clinical_note."""
        notes = dict(enumerate(as_notes(clinical_notes)))
        settings = {"writing": writing, "batch_size": batch_size, "seed": seed}
        results = dict(self.summarize(notes, max_new_tokens, temperature, **settings))
        return [results[number] for number in notes]

    def summarize(
        self,
        notes: Mapping[int, object],
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        *,
        writing: str | None = None,
        batch_size: int = DEFAULT_GENERATION_BATCH_SIZE,
        seed: int = 0,
        on_text: Callable[[int, str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[int, dict]]:
        """Yields (number, result) of numbered notes as their summaries end; results as of `generate_summary`.

        Greedy summaries are the same as one by one; sampled ones depend on the seed and the note's number,
        not on its neighbors. A note that cannot be summarized gets a dict with `error` and an empty
        `generated_summary`. `on_text` gets (number, text) as summaries are written. Once `should_stop()`,
        asked after each forward pass or quoted note, is true, the generator ends without the summaries that
        are not finished.

        Until the generator is used up or closed, other threads' calls wait, and one from the thread that is
        iterating is an InputError, as are settings that fit no note. Raises RunError if the model fails for
        another reason than memory."""
        if not isinstance(notes, Mapping):
            problem = f"notes is a {type(notes).__name__}, not a mapping from numbers to notes"
            raise InputError(problem, "pass dict(enumerate(notes)), or take generate_batch")
        max_new_tokens = self.sft_config["max_new_tokens"] if max_new_tokens is None else max_new_tokens
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        check_config(InferenceConfig(**settings, batch_size=batch_size))
        # Where the adapter was trained on citations, free text has its own
        citations = self.citations and not self.template.number_sentences
        way = way_of_writing(writing, self.sft_config, citations) if writing else self.writing
        with self._own_turn():
            if way != "quote":
                self._load_once()
            made_by = {"made_by": self.made_by(way, **settings)}
            texts = {}
            warnings = {}
            for number, note in notes.items():
                problem = note_problem(note)
                if problem:
                    yield number, failure(problem) | made_by
                else:
                    texts[number], warnings[number] = read_note(note, self.sft_config.get("language"))
            settings = {"temperature": temperature, "seed": seed, "batch_size": batch_size}
            settings["should_stop"] = should_stop
            for number, result in self._write(way, texts, max_new_tokens, on_text, settings):
                yield number, result | made_by | {"warnings": warnings[number] + result["warnings"]}

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

    def _write(
        self,
        way: str,
        texts: Mapping[int, str],
        max_new_tokens: int,
        on_text: Callable[[int, str], None] | None,
        settings: dict,
    ) -> Iterator[tuple[int, dict]]:
        """Yields (number, result) of each text; `settings` are decode_within_memory's."""
        by_sentence = functools.partial(
            write_by_sentence, texts, self.sft_config, self.citations, on_text, settings["should_stop"]
        )
        if way == "quote":
            return by_sentence()
        from sft.inference.decoding import decode_within_memory

        settings = {**settings, "stop_ids": self.stop_ids, "numbers": self._numbers}
        decode = functools.partial(
            decode_within_memory, functools.partial(self.decoder, self._base), **settings
        )
        if way == "verified":
            return by_sentence(functools.partial(ask_specialist, self.prompts, decode, max_new_tokens))
        stream = text_stream(self.tokenizer, self.stop_ids, on_text) if on_text else None
        decode = functools.partial(decode, on_token=stream)
        return write_freely(texts, self.prompts, decode, max_new_tokens)

    def made_by(self, writing: str, max_new_tokens: int, temperature: float, seed: int) -> dict:
        """What a summary was made by: all that decides it, without paths or text. `adapter` is the beginning
        of one hash over the adapter folder's files; what belongs to the model is None where none wrote."""
        of_model = {"dtype": None, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        if writing != "quote":
            of_model["dtype"] = self.quantization or self.placement.dtype_name
        return {
            "adapter": self.sft_config["sha256"]["folder"][:12],
            "prompt_from": self.sft_config.get("prompt_from"),
            "toolkit": __version__,
            "writing": writing,
            "citations": self.citations,
            **(dict.fromkeys(of_model) if writing == "quote" else of_model),
        }

    def prompt_ids(self, note: str, max_new_tokens: int) -> tuple[list[int], list[str]]:
        """(token ids of the note's prompt, warnings), as `NotePrompts.ids`."""
        self.load()
        return self.prompts.ids(note, max_new_tokens)


# ------------------------------------------------------------------------------- command line


def load_inference(config: InferenceConfig) -> SFTInference:
    if config.writing != "quote":
        from sft.model.base import device_of_process

        config.device = device_of_process(config.device)
    names = "device dtype base_model quantization use_8bit use_4bit max_length prompt_from verify".split()
    names += ["writing", "citations"]
    options = {name: getattr(config, name) for name in names}
    return SFTInference(config.model_path, merge=not (config.no_merge or config.merge_to), **options)


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
        "Summarizes clinical notes with a trained adapter: one note, a file, requests, or interactively. "
        "With none of --clinical_note, --input_file and --serve, starts an interactive session."
    )
    config = parse_options(InferenceConfig, description)
    notes = check_files(config)
    sft_config = read_adapter_folder(config.model_path, config.prompt_from)[1]
    way = "free" if config.merge_to else config.writing
    config.writing = way_of_writing(way, sft_config, config.citations)
    log_idle_options(config)
    if config.serve:
        from sft.inference.serve import listen, read_token, serve

        token, listener = read_token(config.serve_token_file), listen(config.serve)
    config.max_new_tokens = config.max_new_tokens or sft_config["max_new_tokens"]
    if config.output_file:
        counts = check_output(config, functools.partial(fingerprint, config, sft_config, notes, __version__))
        if counts is not None:
            log(f"{config.output_file} exists and is complete: nothing to do")
            return report(counts, "", config)
    if config.clinical_note is not None:
        config.clinical_note = read_one_note(config.clinical_note)
    is_piped = is_conversation(config) and not is_terminal(sys.stdin)
    piped = read_piped(config.one_note) if is_piped else None
    with contextlib.ExitStack() as stack:
        if config.writing != "quote":
            from sft.model.base import own_settings

            stack.enter_context(own_settings())
        stack.enter_context(note_terminal(is_conversation(config)))
        if config.merge_to:
            return write_merged(config)
        inference = load_inference(config)
        # Before a file is created or a request taken: is there room for any note?
        if (config.serve or notes is not None) and config.writing != "quote":
            inference.prompts.max_note_tokens(config.max_new_tokens)
        names = ("max_new_tokens", "temperature", "batch_size", "seed")
        settings = {name: getattr(config, name) for name in names}
        summarize = functools.partial(inference.summarize, **settings)
        if config.serve:
            serve(summarize, config.batch_size, listener, token)
        elif notes is not None:
            summarize_file(notes, config, fingerprint(config, sft_config, notes, __version__), summarize)
        elif config.clinical_note is not None:
            write_summary(inference.generate_summary, config.clinical_note, config)
        else:
            converse(inference.generate_summary, config, piped)


if __name__ == "__main__":
    run_script(main)
