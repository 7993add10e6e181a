"""Summaries from a trained adapter: one note, a file of notes, or a conversation.

python sft_inference.py --clinical_note "Patient reports fever of 38.5°C and cough."
python sft_inference.py --input_file notes.csv --output_file summaries.jsonl
python sft_inference.py                                   # interactive

from sft_inference import SFTInference
result = SFTInference("models/sft_specialist/final_model").generate_summary("Patient reports ...")
"""

import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sft_common import InputError, check_new_file, log, number, option, parse_options, run_script, some
from sft_grounding import parse_citations, sentence_spans, split_sentences, strip_citations, unsupported_numbers
from sft_prompt import PromptEncoder, PromptTemplate, pad_token_id
from sft_rows import clean_text, decode_bytes, decode_text, is_blank, read_table

MODEL, INPUT, WRITING, MACHINE = "model", "notes", "writing", "machine"


@dataclass
class InferenceConfig:
    model_path: str = option("./models/sft_specialist/final_model", "the adapter folder", group=MODEL)
    base_model: str | None = option(None, "where its base model is, if not where the adapter says", group=MODEL)
    merge_to: str | None = option(None, "write base model and adapter merged into this folder, and stop", group=MODEL, metavar="DIR")

    clinical_note: str | None = option(None, "one note; - reads it from standard input", group=INPUT, metavar="TEXT")
    input_file: str | None = option(
        None, "notes: .txt (one a line), .csv (column clinical_note, id if there) or .jsonl (the same keys)", group=INPUT, metavar="FILE"
    )
    output_file: str | None = option(
        None, "where the summaries of input_file go: .jsonl or .csv (default: standard output)", group=INPUT, metavar="FILE"
    )
    json: bool = option(False, "print whole results as JSON, one a line", group=INPUT)

    max_new_tokens: int = option(150, "the longest summary, in tokens", type=number(int, 1), group=WRITING)
    temperature: float = option(
        0.0, "0 writes the likeliest summary; above 0 draws from the probabilities", type=number(float, 0), group=WRITING
    )
    seed: int = option(0, "of the drawing", type=number(int, 0, 2**32 - 1), group=WRITING)
    max_length: int | None = option(
        None, "tokens of the longest prompt (default: all the model takes)", type=number(int, 32), group=WRITING
    )

    batch_size: int = option(8, "notes at a time", type=number(int, 1), group=MACHINE)
    device: str = option("auto", "where to run", choices=["auto", "cuda", "mps", "cpu"], group=MACHINE)
    dtype: str = option("auto", "of the base model", choices=["auto", "float32", "bfloat16", "float16"], group=MACHINE)
    use_8bit: bool = option(False, "load the base model in 8 bit (bitsandbytes)", group=MACHINE)
    use_4bit: bool = option(False, "load the base model in 4 bit (bitsandbytes, NF4)", group=MACHINE)


# ------------------------------------------------------------------------------------------------ the specialist


def read_adapter_folder(model_path: str | Path) -> tuple[Path, dict, dict]:
    """(folder, sft_config.json, adapter_config.json). Raises InputError if the folder is not an adapter of this toolkit."""
    folder = Path(model_path)
    if not folder.is_dir():
        raise InputError(
            f"--model_path {folder}: no such folder", "train first (python stage_a_sft_training.py), or name an adapter folder"
        )
    if not (folder / "adapter_config.json").is_file():
        inside = next((path.parent for path in sorted(folder.glob("*/adapter_config.json"), reverse=True)), None)
        raise InputError(f"--model_path {folder}: no adapter here (no adapter_config.json)", f"use {inside or 'a final_model folder'}")
    if not (folder / "adapter_model.safetensors").is_file():
        pickle = " but a pickle file, which is not loaded here" if (folder / "adapter_model.bin").is_file() else ""
        raise InputError(f"--model_path {folder}: no adapter_model.safetensors{pickle}", "restore it or train again")
    configs = []
    for name in ("sft_config.json", "adapter_config.json"):
        try:
            configs.append(json.loads((folder / name).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise InputError(
                f"--model_path {folder}: no {name}: not written by this toolkit", "train with stage_a_sft_training.py"
            ) from None
        except ValueError:
            raise InputError(f"--model_path {folder}: {name} is not valid JSON", "restore it or train again") from None
    try:
        PromptTemplate.from_dict(configs[0]["prompt"])
        texts = *(configs[0]["sha256"][name] for name in ("base_weights", "adapter")), configs[1]["base_model_name_or_path"]
        whole = all(isinstance(text, str) for text in texts) and isinstance(configs[0]["max_length"], int)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(
            f"--model_path {folder}: its configuration lacks the prompt, base model or check sums", "restore it or train again"
        )
    return folder, *configs


class SFTInference:
    """A trained adapter on its base model, ready to summarise.

    Raises InputError if the folder, the base model or the device cannot be used.
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
    ):
        if use_8bit and use_4bit:
            raise InputError("--use_8bit and --use_4bit together", "choose one")
        folder, self.sft_config, adapter_config = read_adapter_folder(model_path)

        from transformers import GenerationConfig

        import sft_model

        self.placement = sft_model.pick_device(device, dtype)
        quantization = "8bit" if use_8bit else "4bit" if use_4bit else None
        self.model, self.tokenizer = sft_model.load_specialist(
            folder, self.sft_config, adapter_config, self.placement, quantization=quantization, base_model=base_model
        )
        self.template = PromptTemplate.from_dict(self.sft_config["prompt"])
        self.encoder = PromptEncoder(self.tokenizer, self.template)
        base = self.model.get_base_model()
        window = getattr(base.config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.window = min(window, max_length or math.inf)  # tokens of prompt and summary together
        own_stops = base.generation_config.eos_token_id
        self.stop_ids = sorted(
            {
                *self.template.stop_token_ids,
                *(own_stops if isinstance(own_stops, list) else [own_stops] if own_stops is not None else []),
            }
        )
        base.generation_config = GenerationConfig()  # a model's own sampling settings must not leak in
        base.config.use_cache = True

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

        Raises InputError for an empty note.
        """
        result = self.generate_batch([clinical_note], max_new_tokens, temperature, seed=seed, on_text=on_text)[0]
        if "error" in result:
            raise InputError(result["error"], "give a note with text")
        return result

    def generate_batch(
        self,
        clinical_notes: Sequence[str],
        max_new_tokens: int = 150,
        temperature: float = 0.0,
        *,
        batch_size: int = 8,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> list[dict]:
        """The summaries of many notes, in their order; greedy ones are the same as one by one. A note that cannot be
        summarised gets a dict with `error` and an empty `generated_summary`."""
        if batch_size < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf:
            raise InputError("batch_size and max_new_tokens must be 1 or more, temperature 0 or more", "see the guide, section 7")
        results: list[dict] = [{} for _ in clinical_notes]
        prompts = {}
        for i, note in enumerate(clinical_notes):
            if isinstance(note, str) and not is_blank(clean_text(note)):
                prompts[i] = self._prompt(clean_text(note), max_new_tokens)
            else:
                results[i] = {"generated_summary": "", "error": "the note is empty" if isinstance(note, str) else "the note is not text"}
        by_length = sorted(prompts, key=lambda i: len(prompts[i][0]))  # so that little is padded
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            written = self._generate([prompts[i][0] for i in chosen], max_new_tokens, temperature, seed, on_text)
            for i, (ids, log_probs, finish_reason) in zip(chosen, written):
                results[i] = self._result(clean_text(clinical_notes[i]), *prompts[i], ids, log_probs, finish_reason)
        return results

    def _prompt(self, note: str, max_new_tokens: int) -> tuple[list[int], list[str]]:
        """(token ids of the prompt, warnings); a note too long for the model is shortened at a sentence boundary."""
        room, warnings = self.window - max_new_tokens - self.encoder.n_template_tokens, []
        if room < 1:
            raise InputError(f"--max_new_tokens {max_new_tokens} leaves no room for a note: the limit is {self.window} tokens", "lower it")
        note_ids = self.encoder.encode_texts([self.template.render_note(note)])[0]
        if len(note_ids) > room:
            note_ids, kept = self.encoder.shorten(note, room)
            total = len(sentence_spans(note))
            what = f"its first {kept} of {total} sentences" if kept else "the beginning of its first sentence"
            warnings.append(f"note shortened: only {what} fit {self.window} tokens")
        ids = self.encoder.prompt(note_ids)
        trained = self.sft_config.get("max_length")
        if trained and len(ids) > trained:
            warnings.append(f"prompt of {len(ids)} tokens: longer than any in training ({trained})")
        return ids, warnings

    def _generate(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float, seed: int, on_text
    ) -> list[tuple[list[int], list[float], str]]:
        """For each prompt (token ids without the end token, log-probability of each with it, finish reason)."""
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        longest, padding = max(map(len, prompts)), pad_token_id(self.tokenizer)
        input_ids = torch.full((len(prompts), longest), padding)
        attention_mask = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, ids in enumerate(prompts):  # on the left, so that every prompt ends where its summary begins
            input_ids[row, longest - len(ids) :] = torch.tensor(ids)
            attention_mask[row, longest - len(ids) :] = 1
        greedy = temperature < 0.01  # below that the division overflows, and the likeliest token is drawn anyway
        sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        recorder = _chosen_log_probs()
        torch.manual_seed(seed)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=input_ids.to(self.placement.device),
                attention_mask=attention_mask.to(self.placement.device),
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens, eos_token_id=self.stop_ids, pad_token_id=padding, use_cache=True, **sampling
                ),
                logits_processor=LogitsProcessorList([recorder]),
                streamer=_text_streamer(self.tokenizer, on_text) if on_text else None,
            )
        new_ids, log_probs = output[:, longest:].tolist(), recorder.finish(output)
        written = []
        for ids, probs in zip(new_ids, log_probs):
            end = next((i for i, token in enumerate(ids) if token in self.stop_ids), None)
            written.append((ids[:end], probs[: len(ids) if end is None else end + 1], "length" if end is None else "stop"))
        return written

    def _result(
        self, note: str, prompt: list[int], warnings: list[str], ids: list[int], log_probs: list[float], finish_reason: str
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
            warnings.append(f"cites sentences the note does not have: {some(missing)}")
        numbers = unsupported_numbers(summary, note)
        if numbers:
            warnings.append(f"states numbers the note does not hold: {some(numbers)}")
        return {
            "generated_summary": summary,
            "evidence": evidence,
            "confidence": math.exp(sum(log_probs) / len(log_probs)) if log_probs else 0.0,
            "warnings": warnings,
            "n_prompt_tokens": len(prompt),
            "n_new_tokens": len(log_probs),
            "finish_reason": finish_reason,
        }


def _chosen_log_probs():
    """A logits processor that changes nothing and remembers the log-probability of each token chosen, at temperature 1."""
    import torch
    from transformers import LogitsProcessor

    class ChosenLogProbs(LogitsProcessor):
        def __init__(self):
            self.before, self.chosen = None, []

        def __call__(self, input_ids, scores):
            self._look_up(input_ids)
            self.before = scores.float().log_softmax(-1)  # (batch, vocabulary)
            return scores

        def _look_up(self, input_ids):
            if self.before is not None:
                self.chosen.append(self.before.gather(1, input_ids[:, -1:]))

        def finish(self, sequences) -> list[list[float]]:
            self._look_up(sequences)
            return torch.cat(self.chosen, dim=1).tolist()

    return ChosenLogProbs()


def _text_streamer(tokenizer, on_text: Callable[[str], None]):
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False):
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------ files


def read_notes(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yields (id, note) of a .txt, .csv or .jsonl file; where there is no id the row's number stands for it, and a note
    of .jsonl may be no text. Raises InputError where the file cannot be read."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".csv":
        for row_number, fields, _ in read_table(path, ("clinical_note",)):
            yield fields.get("id", "").strip() or str(row_number), fields.get("clinical_note", "")
        return
    if kind not in (".txt", ".jsonl"):
        raise InputError(f"{path}: the ending says no format", "use .txt (one note a line), .csv or .jsonl")
    for line_number, line in enumerate(io.StringIO(decode_text(path)), 1):
        if not line.strip():
            continue
        if kind == ".txt":
            yield str(line_number), line
            continue
        try:
            row = json.loads(line)
            note = row["clinical_note"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: line {line_number}: no JSON object with a clinical_note", "write one object a line") from None
        row_id = row.get("id")
        yield str(row_id if isinstance(row_id, str | int) else line_number), note


def defuse(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return "'" + cell if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


CSV_COLUMNS = ("id", "generated_summary", "confidence", "finish_reason", "n_prompt_tokens", "n_new_tokens", "warnings", "evidence", "error")


def format_result(result: dict, kind: str) -> str:
    """One result as a line of .jsonl, a row of .csv, or readable text."""
    if kind == ".jsonl":
        return json.dumps(result, ensure_ascii=False) + "\n"
    if kind == ".csv":
        cells = {
            **result,
            "warnings": "; ".join(result.get("warnings", [])),
            "evidence": json.dumps(result.get("evidence", []), ensure_ascii=False),
        }
        row = io.StringIO()
        csv.writer(row, lineterminator="\n").writerow(
            [defuse(cells[c]) if isinstance(cells.get(c), str) else cells.get(c, "") for c in CSV_COLUMNS]
        )
        return row.getvalue()
    return f"[{result['id']}] {result.get('error') or result['generated_summary']}\n\n"


def summarize_file(inference: SFTInference, notes: list[tuple[str, str]], config: InferenceConfig) -> None:
    """Summaries of all notes, in their order, to the output file (which appears once it is complete) or standard output."""
    from tqdm import tqdm

    target = Path(config.output_file) if config.output_file else None
    kind = target.suffix.lower() if target else ".jsonl" if config.json else ".txt"
    partial = target.with_name(target.name + ".partial") if target else None
    opener = (lambda path, flags: os.open(path, flags, 0o600)) if target else None
    out = open(partial, "w", encoding="utf-8", newline="", opener=opener) if target else sys.stdout  # noqa: SIM115
    counts, started = {"done": 0, "shortened": 0, "failed": 0}, time.perf_counter()
    bar = tqdm(total=len(notes), unit="note", file=sys.stderr, disable=None)
    try:
        if kind == ".csv":
            out.write(",".join(CSV_COLUMNS) + "\n")
        window = config.batch_size * 8  # sorted by length inside a window, written in order at its end
        for start in range(0, len(notes), window):
            part = notes[start : start + window]
            results = inference.generate_batch(
                [note for _, note in part], config.max_new_tokens, config.temperature, batch_size=config.batch_size, seed=config.seed
            )
            for (note_id, _), result in zip(part, results):
                out.write(format_result({"id": note_id, **result}, kind))
                counts["failed" if "error" in result else "done"] += 1
                counts["shortened"] += any(warning.startswith("note shortened") for warning in result.get("warnings", []))
            out.flush()
            bar.update(len(part))
        if target:
            os.fsync(out.fileno())
            os.replace(partial, target)
    except BaseException:
        if target:
            log(f"\nnot complete: what is done so far is in {partial}")
        raise
    finally:
        bar.close()
        if target:
            out.close()
    seconds = time.perf_counter() - started
    where = f", written to {target}" if target else ""
    log(
        f"{counts['done']:,} done, {counts['shortened']:,} of them shortened, {counts['failed']:,} failed; {len(notes) / seconds:.2f} notes/s{where}"
    )


def check_files(config: InferenceConfig) -> list[tuple[str, str]] | None:
    """The notes of input_file, once it is clear that they can be read and their summaries written."""
    if config.clinical_note is not None and config.input_file:
        raise InputError("--clinical_note and --input_file together", "choose one")
    if config.output_file and not config.input_file:
        raise InputError("--output_file without --input_file", "name the file with the notes; one note's summary goes to standard output")
    if config.merge_to and (config.clinical_note is not None or config.input_file):
        raise InputError("--merge_to together with notes", "merge first, then summarise")
    check_new_file("--output_file", config.output_file, (".jsonl", ".csv"))
    check_new_file("--merge_to", config.merge_to)
    if not config.input_file:
        return None
    notes = list(read_notes(config.input_file))
    if not notes:
        raise InputError(f"{config.input_file}: no notes in it", "check the file")
    return notes


# ------------------------------------------------------------------------------------------------ conversation

HELP = """Type or paste a note and press Enter; it may have many lines. Lines typed one by one: end each but the last with \\.
  /temperature T   0 writes the likeliest summary, above 0 draws (now {temperature:g})
  /tokens N        the longest summary in tokens (now {max_new_tokens})
  /evidence        the sentences the last summary cites, and its warnings
  /help            this
  /quit            leave (also Ctrl-D). Ctrl-C stops a summary being written."""


def read_block(prompt: str) -> str:
    """One note or command from standard input. Raises EOFError at its end.

    On a terminal, Enter ends it unless more pasted lines wait or the line ends in a backslash. Piped, an empty line or a
    command ends it.
    """
    terminal = sys.stdin.isatty()
    lines = [input(prompt if terminal else "")]
    if terminal:
        import select

        def more() -> bool:
            return lines[-1].endswith("\\") or bool(select.select([sys.stdin], [], [], 0.05)[0])

        with suppress(EOFError):
            while more():
                lines[-1] = lines[-1].removesuffix("\\")
                lines.append(input(""))
    else:
        with suppress(EOFError):
            while lines[-1].strip() and not lines[-1].startswith("/"):
                lines.append(input(""))
    return "\n".join(lines)


def converse(inference: SFTInference, config: InferenceConfig) -> None:
    """The interactive session. What is typed stays in memory: it is patient text."""
    with suppress(ImportError):
        import readline  # noqa: F401 (line editing and in-memory history for input())
    temperature, max_new_tokens, last = config.temperature, config.max_new_tokens, None
    log("Paste a clinical note and press Enter. /help for help, /quit to leave.")
    while True:
        try:
            block = read_block("note> ").strip()
        except EOFError:
            return log()
        except KeyboardInterrupt:
            log("\n(/quit or Ctrl-D leaves)")
            continue
        *note_lines, command = block.split("\n") if block.split("\n")[-1].startswith("/") else [*block.split("\n"), ""]
        note = "\n".join(note_lines).strip()
        if note:
            try:
                started = time.perf_counter()
                last = inference.generate_summary(
                    note, max_new_tokens, temperature, seed=config.seed, on_text=lambda text: print(text, end="", flush=True)
                )
                print(flush=True)
                tell(last, time.perf_counter() - started)
            except KeyboardInterrupt:
                print(flush=True)
                log("(stopped)")
            except InputError as error:
                log(f"error: {error.problem}")
            except RuntimeError as error:  # too little memory for this note, say: the conversation goes on
                log(f"error: no summary of this note ({type(error).__name__})")
        word, _, value = command.partition(" ")
        try:
            if word in ("/quit", "/exit", "/q"):
                return
            elif word == "/temperature":
                temperature = number(float, 0)(value)
            elif word == "/tokens":
                max_new_tokens = number(int, 1)(value)
            elif word == "/evidence":
                log(show_evidence(last) if last else "no summary yet")
            elif word:
                log(
                    HELP.format(temperature=temperature, max_new_tokens=max_new_tokens)
                    if word == "/help"
                    else f"no command {word}; /help lists them"
                )
        except Exception as error:  # argparse's ArgumentTypeError: the value is out of range
            log(f"error: {error}")


def show_evidence(result: dict) -> str:
    lines = []
    for citation in result["evidence"]:
        lines.append(f"{citation['claim']}  (confidence the model wrote: {citation['confidence']:.2f})")
        lines += [
            f"    S{n}: {text}"
            for n, text in zip((n for n in citation["sentence_numbers"] if n not in citation["missing"]), citation["sentences"])
        ]
    return "\n".join(lines or ["the last summary cites nothing"])


def tell(result: dict, seconds: float) -> None:
    """Timing and warnings of one summary, to stderr."""
    rate = result["n_new_tokens"] / seconds
    log(
        f"({result['n_prompt_tokens']:,} prompt tokens, {result['n_new_tokens']} new in {seconds:.1f} s, {rate:.0f}/s; confidence {result['confidence']:.2f})"
    )
    for warning in result["warnings"]:
        log(f"warning: {warning}")


def main() -> None:
    config = parse_options(InferenceConfig, "Summarises clinical notes with a trained adapter: one note, a file, or interactively.")
    notes = check_files(config)
    read_adapter_folder(config.model_path)
    if config.clinical_note == "-":
        config.clinical_note = decode_bytes(sys.stdin.buffer.read(), "standard input")
    if config.clinical_note is not None and is_blank(clean_text(config.clinical_note)):
        raise InputError("--clinical_note is empty", "give a note with text")
    inference = SFTInference(
        config.model_path,
        config.device,
        config.dtype,
        base_model=config.base_model,
        use_8bit=config.use_8bit,
        use_4bit=config.use_4bit,
        max_length=config.max_length,
    )
    if config.merge_to:
        from sft_model import save_merged

        save_merged(inference.model, inference.tokenizer, inference.stop_ids, Path(config.merge_to))
        log(f"Saved the merged model to {config.merge_to}")
    elif notes is not None:
        summarize_file(inference, notes, config)
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
        print(json.dumps(result, ensure_ascii=False) if config.json else "" if stream else result["generated_summary"], flush=True)
        tell(result, time.perf_counter() - started)
    else:
        converse(inference, config)


if __name__ == "__main__":
    run_script(main)
