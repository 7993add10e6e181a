"""Summaries from a trained adapter: one note, a file of notes, or a conversation.

python sft_inference.py --clinical_note "Patient reports fever of 38.5°C and cough."
python sft_inference.py --input_file notes.csv --output_file summaries.jsonl
python sft_inference.py                                   # interactive

from sft_inference import SFTInference
result = SFTInference("models/sft_specialist/final_model").generate_summary("Patient reports ...")
"""

import errno
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sft.cli import InputError, RunError, log, plural, preview_list, processes, run_script
from sft.data.prompt import PromptEncoder, PromptTemplate
from sft.data.text import clean_text, decode_bytes, is_blank
from sft.files import check_new_file, sha256
from sft.grounding.citations import parse_citations, strip_citations
from sft.grounding.numbers import unsupported_numbers
from sft.grounding.sentences import sentence_spans, split_sentences
from sft.inference.chat import converse, log_result
from sft.inference.note_files import check_output, read_notes, summarize_file
from sft.options import InferenceConfig, parse_options

# ------------------------------------------------------------------------------------------------ the specialist


def read_adapter_folder(model_path: str | Path) -> tuple[Path, dict, dict]:
    """(folder, sft_config.json, adapter_config.json). Raises InputError if the folder is not an adapter of this toolkit."""
    folder = Path(model_path)
    if not folder.is_dir():
        raise InputError(
            f"--model_path {folder}: no such folder",
            "train first (python stage_a_sft_training.py), or name an adapter folder",
        )
    if not (folder / "adapter_config.json").is_file():
        inside = next(
            (path.parent for path in sorted(folder.glob("*/adapter_config.json"), reverse=True)), None
        )
        raise InputError(
            f"--model_path {folder}: no adapter here (no adapter_config.json)",
            f"use {inside or 'a final_model folder'}",
        )
    if not (folder / "adapter_model.safetensors").is_file():
        pickle = (
            " but a pickle file, which is not loaded here" if (folder / "adapter_model.bin").is_file() else ""
        )
        raise InputError(
            f"--model_path {folder}: no adapter_model.safetensors{pickle}", "restore it or train again"
        )
    configs = []
    for name in ("sft_config.json", "adapter_config.json"):
        try:
            configs.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise InputError(
                f"--model_path {folder}: no {name}: not written by this toolkit",
                "train with stage_a_sft_training.py",
            ) from None
        except ValueError:
            raise InputError(
                f"--model_path {folder}: {name} is not valid JSON", "restore it or train again"
            ) from None
    try:
        PromptTemplate.from_dict(configs[0]["prompt"])
        texts = (
            *(configs[0]["sha256"][name] for name in ("base_weights", "adapter")),
            configs[1]["base_model_name_or_path"],
        )
        whole = all(isinstance(text, str) for text in texts) and isinstance(configs[0]["max_length"], int)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(
            f"--model_path {folder}: its configuration lacks the prompt, base model or check sums",
            "restore it or train again",
        )
    return folder, *configs


class SFTInference:
    """A trained adapter on its base model, ready to summarise.

    With `merge` (the default) a float32 adapter is merged into the weights, and these are packed for speed on a CPU, in 8 bit
    with `use_8bit`; without it `model` is the PeftModel as it was loaded. Raises InputError if the folder, the base model or the device cannot be used.
    """

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
    ):
        if use_8bit and use_4bit:
            raise InputError("--use_8bit and --use_4bit together", "choose one")
        folder, self.sft_config, adapter_config = read_adapter_folder(model_path)

        import torch
        from transformers import GenerationConfig

        from sft.inference.decoding import decode, decode_with_generate, supports_kv_cache
        from sft.model.adapter import load_specialist, merge_into_int8
        from sft.model.base import pick_device
        from sft.model.kernels import PackedLinear, has_int8, has_onednn, replace_linear_layers

        self.placement = pick_device(device, dtype)
        on_cpu = self.placement.device.type == "cpu"
        quantization = "8bit" if use_8bit else "4bit" if use_4bit else None
        if use_8bit and merge and on_cpu and has_int8():  # faster and more exact than bitsandbytes there
            quantization = "int8"
        self.model, self.tokenizer = load_specialist(
            folder,
            self.sft_config,
            adapter_config,
            self.placement,
            quantization=quantization,
            base_model=base_model,
        )
        base = self.model.get_base_model()
        window = getattr(base.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.window = min(window, max_length or math.inf)  # tokens of prompt and summary together
        own_stops = base.generation_config.eos_token_id
        own_stops = own_stops if isinstance(own_stops, list) else [own_stops] if own_stops is not None else []
        base.generation_config = GenerationConfig()  # a model's own sampling settings must not leak in
        base.config.use_cache = True
        self.template = PromptTemplate.from_dict(self.sft_config["prompt"])
        self.encoder = PromptEncoder(self.tokenizer, self.template)
        self.stop_ids = sorted({*self.template.stop_token_ids, *own_stops})
        if quantization == "int8":
            self.model = base = merge_into_int8(self.model, self.placement.dtype)
        elif (
            merge and not quantization and self.placement.dtype is torch.float32
        ):  # 16 bits would round some of the adapter away
            self.model = base = self.model.merge_and_unload()
            if on_cpu and has_onednn():
                replace_linear_layers(base, PackedLinear)
        self.decode = functools.partial(decode, base, stop_ids=self.stop_ids)
        if not supports_kv_cache(base):
            log(
                "note: this model's attention cannot run in the decoding loop; transformers' generate writes instead, more slowly"
            )
            self.decode = functools.partial(decode_with_generate, base, stop_ids=self.stop_ids)

    def generate_summary(
        self,
        clinical_note: str,
        max_new_tokens: int = 150,
        temperature: float = 0.0,
        *,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> dict:
        """The summary of one note. `temperature` 0 is greedy and always the same; `on_text` gets the text as it is written.

        Returns a dict: `generated_summary`; `evidence` (its citations, see sft_grounding.parse_citations); `confidence`
        (0 to 1: the geometric mean of the probabilities the model gave to the tokens it wrote; how sure it was of its
        words, not whether they are true); `warnings` (list of str); `n_prompt_tokens`; `n_new_tokens` (with the end
        token); `finish_reason` ("stop", or "length" where max_new_tokens cut it).

        Raises InputError for an empty note, RunError where memory does not suffice.
        """
        if not isinstance(clinical_note, str) or is_blank(clean_text(clinical_note)):
            raise InputError(
                "the note is empty" if isinstance(clinical_note, str) else "the note is not text",
                "give a note with text",
            )
        on_token = text_stream(self.tokenizer, self.stop_ids, on_text) if on_text else None
        result = self._summarize({0: clinical_note}, max_new_tokens, temperature, 1, seed, on_token=on_token)[
            0
        ]
        if "error" in result:
            raise RunError(result["error"], "lower --max_length, or use a smaller model or --use_4bit")
        return result

    def generate_batch(
        self,
        clinical_notes: Sequence[str],
        max_new_tokens: int = 150,
        temperature: float = 0.0,
        *,
        batch_size: int = 32,
        seed: int = 0,
        first_index: int = 0,
        on_done: Callable[[], None] | None = None,
        on_token: Callable | None = None,
    ) -> list[dict]:
        """The summaries of many notes, in their order; greedy ones are the same as one by one. Drawn ones depend on the
        seed and the note's number (the first is `first_index`), not on its neighbours. A note that cannot be summarised
        gets a dict with `error` and an empty `generated_summary`. `on_done` is called as each summary ends, `on_token` with
        a GeneratedSequence after each token.

        Raises InputError for settings that fit no note, RunError where the model fails otherwise than for want of memory."""
        if batch_size < 1:
            raise InputError(f"batch_size {batch_size}", "give 1 or more")
        if isinstance(clinical_notes, str):
            raise InputError("clinical_notes is one text", "give a list of notes, or call generate_summary")
        numbered = dict(enumerate(clinical_notes, first_index))
        results = self._summarize(
            numbered, max_new_tokens, temperature, batch_size, seed, on_token=on_token, on_done=on_done
        )
        return [results[i] for i in numbered]

    def _summarize(
        self,
        notes: dict[int, object],
        max_new_tokens: int,
        temperature: float,
        batch_size: int,
        seed: int,
        *,
        on_token: Callable | None = None,
        on_done: Callable[[], None] | None = None,
    ) -> dict[int, dict]:
        """The results by the notes' numbers. Where memory does not suffice, half as many notes at a time are tried."""
        if max_new_tokens < 1 or not 0 <= temperature < math.inf:
            raise InputError(
                "max_new_tokens must be 1 or more, temperature 0 or more", "see the guide, section 7"
            )
        results, prompts, texts = {}, {}, {}
        for i, note in notes.items():
            texts[i] = clean_text(note) if isinstance(note, str) else ""
            if not is_blank(texts[i]):
                prompts[i] = self._prompt(texts[i], max_new_tokens)
            else:
                results[i] = failure("the note is empty" if isinstance(note, str) else "the note is not text")
        left = {i: ids for i, (ids, _) in prompts.items()}
        while left:
            try:
                options = {
                    "temperature": temperature,
                    "batch_size": batch_size,
                    "seed": seed,
                    "on_token": on_token,
                }
                for written in self.decode(dict(left), max_new_tokens, **options):
                    ended = written.finish_reason == "stop"
                    ids = written.ids[: len(written.ids) - ended]
                    results[written.index] = self._result(
                        texts[written.index],
                        *prompts[written.index],
                        ids,
                        written.log_probs,
                        written.finish_reason,
                    )
                    del left[written.index]
                    if on_done:
                        on_done()
            except (MemoryError, RuntimeError, OSError) as error:
                if not is_out_of_memory(error):
                    if not isinstance(error, RuntimeError):
                        raise
                    reason = str(error).partition("\n")[0]
                    raise RunError(
                        f"the model failed ({type(error).__name__}: {reason})",
                        "check the device and its driver",
                    ) from error
                if batch_size > 1 and len(left) > 1:
                    batch_size = min(batch_size, len(left)) // 2
                else:
                    longest = max(left, key=lambda i: len(left[i]))  # it was the first to be tried
                    del left[longest]
                    results[longest] = failure("too little memory for this note")
        return results

    def room(self, max_new_tokens: int) -> float:
        """Tokens that are left for a note. Raises InputError where there are none."""
        room = self.window - max_new_tokens - self.encoder.n_template_tokens
        if room < 1:
            raise InputError(
                f"--max_new_tokens {max_new_tokens} leaves no room for a note: the limit is {self.window} tokens",
                "lower it",
            )
        return room

    def _prompt(self, note: str, max_new_tokens: int) -> tuple[list[int], list[str]]:
        """(token ids of the prompt, warnings); a note too long for the model is shortened at a sentence boundary."""
        room, warnings = self.room(max_new_tokens), []
        # A token of text is hardly ever 100 characters: of an enormous note only the beginning is tokenised
        note_ids = (
            self.encoder.encode_texts([self.template.render_note(note)])[0]
            if len(note) <= room * 100
            else None
        )
        if note_ids is None or len(note_ids) > room:
            note_ids, kept = self.encoder.shorten(note, room)
            total = len(sentence_spans(note))
            what = f"its first {kept} of {total} sentences" if kept else "the beginning of its first sentence"
            warnings.append(f"note shortened: only {what} fit {self.window} tokens")
        ids = self.encoder.prompt(note_ids)
        trained = self.sft_config.get("max_length")
        if trained and len(ids) > trained:
            warnings.append(f"prompt of {len(ids)} tokens: longer than any in training ({trained})")
        return ids, warnings

    def _result(
        self,
        note: str,
        prompt: list[int],
        warnings: list[str],
        ids: list[int],
        log_probs: list[float],
        finish_reason: str,
    ) -> dict:
        summary = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        evidence, warnings = parse_citations(summary, note), list(warnings)
        missing = [f"S{n}" for citation in evidence for n in citation["missing"]]
        if finish_reason == "length":
            warnings.append(f"summary cut after {len(ids)} tokens: raise max_new_tokens")
        if not summary:
            warnings.append("the model wrote nothing")
        sentences = split_sentences(strip_citations(summary))
        if len(set(sentences)) < len(sentences):
            warnings.append("the summary repeats itself")
        if missing:
            warnings.append(f"cites sentences the note does not have: {preview_list(missing)}")
        numbers = unsupported_numbers(summary, note)
        if numbers:
            warnings.append(f"states numbers the note does not hold: {preview_list(numbers)}")
        return {
            "generated_summary": summary,
            "evidence": evidence,
            "confidence": round(math.exp(sum(log_probs) / len(log_probs)), 4),
            "warnings": warnings,
            "n_prompt_tokens": len(prompt),
            "n_new_tokens": len(log_probs),
            "finish_reason": finish_reason,
        }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, Python or the operating system has no memory left: another batch size, or another note, may fit."""
    from accelerate.utils.memory import should_reduce_batch_size

    return (
        isinstance(error, MemoryError)
        or should_reduce_batch_size(error)
        or "DefaultCPUAllocator: not enough memory" in str(error)  # its words on Windows
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)  # from mmap
    )


def failure(reason: str) -> dict:
    return {"generated_summary": "", "error": reason}


def text_stream(tokenizer, stop_ids: Sequence[int], on_text: Callable[[str], None]) -> Callable:
    """A function for each new token of one sequence that hands on the text it adds; half a character waits for its rest."""
    shown = ""

    def on_token(written) -> None:
        nonlocal shown
        text = tokenizer.decode(
            [token for token in written.ids if token not in stop_ids], skip_special_tokens=True
        )
        if text.endswith("\ufffd") and not written.finish_reason:
            return
        on_text(text[len(shown) :])
        shown = text

    return on_token


# ------------------------------------------------------------------------------------------------ conversation


# ------------------------------------------------------------------------------------------------ command line


def check_files(config: InferenceConfig) -> list[tuple[str, object]] | None:
    """The notes of input_file, once it is clear that they can be read and their summaries written."""
    if config.clinical_note is not None and config.input_file:
        raise InputError("--clinical_note and --input_file together", "choose one")
    if config.output_file and not config.input_file:
        raise InputError(
            "--output_file without --input_file",
            "name the file with the notes; one note's summary goes to standard output",
        )
    if config.merge_to and (config.clinical_note is not None or config.input_file):
        raise InputError("--merge_to together with notes", "merge first, then summarise")
    if config.resume and not config.output_file:
        raise InputError("--resume without --output_file", "name the file to go on with")
    if processes()[1] > 1 and not config.output_file:
        raise InputError(
            "several processes, but no --output_file",
            "they share the notes of an --input_file and join their --output_file",
        )
    check_new_file("--merge_to", config.merge_to)
    if not config.input_file:
        return None
    notes = list(read_notes(config.input_file))
    if not notes:
        raise InputError(f"{config.input_file}: no notes in it", "check the file")
    return notes


def belongs_to(config: InferenceConfig, sft_config: dict) -> dict:
    """What must be the same for a file of summaries to be the same: hashes and settings, no text."""
    from sft.model.base import pick_device

    return {
        "input_file": sha256(Path(config.input_file)),
        "adapter": sft_config["sha256"]["adapter"],
        "base model": sft_config["sha256"]["base_weights"],
        "dtype": str(pick_device(config.device, config.dtype).dtype),
        **{
            name: getattr(config, name)
            for name in ("max_new_tokens", "temperature", "seed", "max_length", "batch_size", "no_merge")
        },
        **{name: getattr(config, name) for name in ("use_8bit", "use_4bit")},
    }


def write_file(inference: SFTInference, notes: list[tuple[str, object]], config: InferenceConfig) -> None:
    """All notes of input_file. Raises Stopped after SIGTERM or Ctrl-C."""
    inference.room(config.max_new_tokens)  # refuses before a file is begun

    def summarize(part: list, first: int, on_done: Callable, on_token: Callable) -> list[dict]:
        return inference.generate_batch(
            part,
            config.max_new_tokens,
            config.temperature,
            batch_size=config.batch_size,
            seed=config.seed,
            first_index=first,
            on_done=on_done,
            on_token=on_token,
        )

    summarize_file(notes, config, belongs_to(config, inference.sft_config), summarize)


def device_of_process(device: str) -> str:
    """Of several processes on GPUs each has one of its own. Raises InputError where there are too few."""
    if processes()[1] == 1 or device not in ("auto", "cuda"):
        return device
    import torch

    if not torch.cuda.is_available():
        return device
    rank, n_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= n_gpus:
        raise InputError(
            f"process {rank + 1} of this machine finds no GPU of its own: there {'is' if n_gpus == 1 else 'are'} {plural(n_gpus, 'GPU')}",
            "start as many processes as there are GPUs, or give --device cpu",
        )
    return f"cuda:{rank}"


def main() -> None:
    config = parse_options(
        InferenceConfig,
        "Summarises clinical notes with a trained adapter: one note, a file, or interactively.",
    )
    notes = check_files(config)
    sft_config = read_adapter_folder(config.model_path)[1]
    if config.output_file and check_output(
        config.output_file, config.resume, lambda: belongs_to(config, sft_config)
    ):
        return log(f"{config.output_file} is there and complete: nothing to do")
    if config.clinical_note == "-":
        config.clinical_note = decode_bytes(sys.stdin.buffer.read(), "standard input")
    if config.clinical_note is not None and is_blank(clean_text(config.clinical_note)):
        raise InputError("--clinical_note is empty", "give a note with text")
    config.device = device_of_process(config.device)
    inference = SFTInference(
        config.model_path,
        config.device,
        config.dtype,
        base_model=config.base_model,
        use_8bit=config.use_8bit,
        use_4bit=config.use_4bit,
        max_length=config.max_length,
        merge=not (config.no_merge or config.merge_to),
    )
    if config.merge_to:
        from sft.model.adapter import save_merged

        save_merged(inference.model, inference.tokenizer, inference.stop_ids, Path(config.merge_to))
        log(f"Saved the merged model to {config.merge_to}")
    elif notes is not None:
        write_file(inference, notes, config)
    elif config.clinical_note is not None:
        started = time.perf_counter()
        stream = not config.json and sys.stdout.isatty()
        result = inference.generate_summary(
            config.clinical_note,
            config.max_new_tokens,
            config.temperature,
            seed=config.seed,
            on_text=(lambda text: print(text, end="", flush=True)) if stream else None,
        )
        print(
            json.dumps(result, ensure_ascii=False)
            if config.json
            else ""
            if stream
            else result["generated_summary"],
            flush=True,
        )
        log_result(result, time.perf_counter() - started)
    else:
        converse(inference, config)


if __name__ == "__main__":
    run_script(main)
