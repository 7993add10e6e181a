"""A file of notes in, a file of summaries out: formats, resuming after an interruption, several processes.

Notes are summarized in windows of WINDOW batches: sorted by length inside a window, written in input order at
its end. Until all is done the output is FILE.partial; beside it FILE.partial.json records the fingerprint of
the run (hashes and settings, no text) and how many bytes of FILE.partial are complete windows. What follows
them is computed again, so a resumed file is identical to the byte. Beside the complete output .FILE.done.json
keeps the fingerprint."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sft.cli import (
    InputError,
    Progress,
    RunError,
    Stopped,
    log,
    noted_signals,
    plural,
    preview_list,
    processes,
    safe_id,
)
from sft.data.rows import TOO_MANY_FIELDS, read_table
from sft.data.text import clean_text, decode_text
from sft.files import check_new_file, lock, sync_dir, write_json
from sft.options import InferenceConfig

# Batches between two writes: the end of a window, when the batch is no longer full, costs little
WINDOW = 8

Notes = list[tuple[str, object]]  # (id, text); what a .jsonl file calls a note may be no text


# ------------------------------------------------------------------------------- formats


def read_notes(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yields (id, note) of a .txt, .csv or .jsonl file. Without an id the row's or line's number takes its
    place; a note of .jsonl may be no text. Raises InputError if the file cannot be read."""
    path = Path(path)
    readers = {".csv": _read_csv, ".txt": _read_txt, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        fix = "use .txt (one note per line), .csv or .jsonl"
        raise InputError(f"{path}: unknown file extension", fix)
    return readers[path.suffix.lower()](path)


def _read_csv(path: Path) -> Iterator[tuple[str, str]]:
    bad = []
    for row_number, fields, too_many in read_table(path, ("clinical_note",)):
        row_id = fields.get("id", "").strip() or str(row_number)
        if too_many:
            bad.append(f"row {row_number:,} (id {safe_id(row_id)})")
        yield row_id, fields.get("clinical_note", "")
    if bad:
        raise InputError(f"{path}: {TOO_MANY_FIELDS}: {preview_list(bad)}", "fix these rows")


def _read_txt(path: Path) -> Iterator[tuple[str, str]]:
    for line_number, line in _lines(path):
        yield str(line_number), line


def _read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    for line_number, line in _lines(path):
        try:
            row = json.loads(line)
            note = row["clinical_note"]
        except (ValueError, KeyError, TypeError, RecursionError):
            problem = f"{path}: line {line_number}: no JSON object with a clinical_note"
            raise InputError(problem, "write one object per line") from None
        row_id = row.get("id")
        row_id = clean_text(str(row_id)) if isinstance(row_id, str | int) else ""
        yield row_id or str(line_number), note


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that are not blank, whatever their line ends."""
    for line_number, line in enumerate(io.StringIO(decode_text(path), newline=None), 1):
        if line.strip():
            yield line_number, line


CSV_COLUMNS = (
    "id generated_summary confidence finish_reason n_prompt_tokens n_new_tokens warnings evidence error"
).split()


def format_result(result: dict, kind: str) -> str:
    """One result as a line of .jsonl, a row of .csv, or readable text."""
    if kind == ".jsonl":
        return json.dumps(result, ensure_ascii=False) + "\n"
    if kind == ".csv":
        cells = dict(result)
        cells["warnings"] = "; ".join(result.get("warnings", []))
        cells["evidence"] = json.dumps(result.get("evidence", []), ensure_ascii=False)
        row = io.StringIO()
        csv.writer(row, lineterminator="\n").writerow([defuse(cells.get(name, "")) for name in CSV_COLUMNS])
        return row.getvalue()
    return f"[{result['id']}] {result.get('error') or result['generated_summary']}\n\n"


def defuse(cell):
    """A cell that no spreadsheet takes for a formula."""
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if is_formula else cell


# ------------------------------------------------------------------------------- outputs


def count(results: list[dict]) -> dict[str, int]:
    n_failed = sum("error" in result for result in results)
    n_shortened = sum(
        any(warning.startswith("note shortened") for warning in result.get("warnings", []))
        for result in results
    )
    return {"done": len(results) - n_failed, "shortened": n_shortened, "failed": n_failed}


class StandardOutput:
    """Results to standard output, which cannot be resumed."""

    def __init__(self, kind: str):
        self.kind = kind
        self.n_done = 0
        self.counts = count([])

    def add(self, results: list[dict]) -> None:
        sys.stdout.write("".join(format_result(result, self.kind) for result in results))
        sys.stdout.flush()
        self.n_done += len(results)
        for name, n in count(results).items():
            self.counts[name] += n

    def close(self) -> None:
        pass


class PartialFile:
    """FILE.partial, locked, and its record: `fingerprint`, `done` (notes), `bytes` and `counts`.

    Raises InputError if a partial file exists and `resume` is false, or if it is another run's.
    """

    def __init__(self, path: Path, kind: str, header: str, fingerprint: dict, resume: bool):
        self.path = path
        self.kind = kind
        self.record = {"fingerprint": fingerprint, "done": 0, "bytes": 0, "counts": count([])}
        if path.is_symlink():
            fix = "rename or move it: summaries are written to a file of their own"
            raise InputError(f"{path} is a symbolic link", fix)
        _check_resume(path, resume)
        has_record = path.exists() and record_path(path).exists()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self.file = os.fdopen(os.open(path, flags, 0o600), "r+b")
        try:
            fix = "wait for it, or choose another --output_file"
            lock(self.file, f"another process is writing {path}", fix)
            if has_record:
                self.record = self._read_own_record(fingerprint)
            elif not header.encode().startswith(self.file.read(len(header) + 1)):
                # More than a run leaves that was killed before its first record
                problem = f"{path} exists, but its record {record_path(path).name} is missing or unreadable"
                raise InputError(f"{problem}, so this run cannot be matched to it", "rename or move it")
        except InputError:
            self.file.close()
            raise
        os.chmod(path, 0o600)
        self.file.truncate(self.record["bytes"])
        self.file.seek(self.record["bytes"])
        if not has_record:
            self._append(header)
            write_json(record_path(path), self.record)

    def _read_own_record(self, fingerprint: dict) -> dict:
        record = read_record(record_path(self.path))
        fix = "use the same files and options, or delete it and its .json to start over"
        check_fingerprint(self.path, record["fingerprint"], fingerprint, fix)
        if self.path.stat().st_size < record["bytes"]:
            fix = "delete it and its .json to start over"
            raise InputError(f"{self.path} is shorter than its record says", fix)
        return record

    @property
    def n_done(self) -> int:
        return self.record["done"]

    @property
    def counts(self) -> dict[str, int]:
        return self.record["counts"]

    def add(self, results: list[dict]) -> None:
        """Appends one window; it counts once the record has followed."""
        self._append("".join(format_result(result, self.kind) for result in results))
        self.record["done"] += len(results)
        for name, n in count(results).items():
            self.record["counts"][name] += n
        write_json(record_path(self.path), self.record)

    def _append(self, text: str) -> None:
        self.file.write(text.encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.record["bytes"] = self.file.tell()

    def close(self) -> None:
        self.file.close()


def _check_resume(partial: Path, resume: bool) -> None:
    if partial.exists() and not resume:
        fix = "add --resume to continue it, or delete it"
        raise InputError(f"{partial} exists: an earlier run was interrupted", fix)


# ------------------------------------------------------------------------------- records and names


def read_record(path: Path) -> dict:
    """A partial file's record. Raises InputError if it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "belongs_to" in record:  # as written by 18a780b
            record["fingerprint"] = record.pop("belongs_to")
        numbers = [record["bytes"], record["done"], *(record["counts"][name] for name in count([]))]
        intact = isinstance(record["fingerprint"], dict)
        intact = intact and all(isinstance(number, int) and number >= 0 for number in numbers)
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise InputError(f"{path} is damaged", f"delete it and {path.stem} to start over")
    return record


def check_fingerprint(path: Path, recorded: dict, fingerprint: dict, fix: str) -> None:
    """Raises InputError if the two fingerprints differ."""
    names = sorted(recorded.keys() | fingerprint.keys())
    different = [name for name in names if recorded.get(name) != fingerprint.get(name)]
    if different:
        raise InputError(f"{path} was written with a different {', '.join(different)}", fix)


def record_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def done_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.done.json")


def partial_path(target: Path, rank: int, n_processes: int) -> Path:
    part = f"-{rank + 1}-of-{n_processes}" if n_processes > 1 else ""
    return target.with_name(f"{target.name}.partial{part}")


def existing_partials(target: Path) -> list[Path]:
    """Partial files of `target`, of any number of processes, of which the file or its record exists."""
    pattern = re.compile(re.escape(target.name) + r"\.partial(-\d+-of-\d+)?(\.json)?")
    paths = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    return [target.with_name(name) for name in sorted({path.name.removesuffix(".json") for path in paths})]


def check_output(output_file: str, resume: bool, fingerprint: Callable[[], dict]) -> bool:
    """Whether the output file is complete already. Raises InputError if it cannot be written, or is another
    run's."""
    target = Path(output_file)
    if resume and target.exists():
        _check_complete(target, fingerprint())
        return True
    check_new_file("--output_file", output_file, (".jsonl", ".csv"))
    # The names of the partial files and their records must fit too
    if len(os.fsencode(target.name)) > 200:
        raise InputError("--output_file: the name is too long", "choose one of at most 200 bytes")
    rank, n_processes = processes()
    expected = {partial_path(target, i, n_processes) for i in range(n_processes)}
    others = [path for path in existing_partials(target) if path.exists() and path not in expected]
    if others:
        problem = f"{others[0].name} exists: the earlier run used a different number of processes"
        raise InputError(problem, "use the same number with --resume, or delete it")
    _check_resume(partial_path(target, rank, n_processes), resume)
    return False


def _check_complete(target: Path, fingerprint: dict) -> None:
    """Raises InputError unless this run wrote `target`; removes its partial files, if it was killed before
    that."""
    fix = "rename or move it, or choose another --output_file"
    try:
        recorded = dict(json.loads(done_path(target).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        problem = f"{target} exists, but its record {done_path(target).name} is missing or unreadable"
        raise InputError(f"{problem}, so this run cannot be matched to it", fix) from None
    check_fingerprint(target, recorded, fingerprint, fix)
    for partial in existing_partials(target):
        # Without an intact record it is not known to be this run's, and stays
        with contextlib.suppress(InputError, FileNotFoundError):
            record = read_record(record_path(partial))
            if recorded.items() <= record["fingerprint"].items():
                remove_partials([partial])


def join_partials(partials: list[Path], target: Path, fingerprint: dict) -> None:
    """Moves the complete partial files, end to end, to `target`, which appears whole or not at all, after its
    record. Raises InputError if another file has appeared there."""
    if target.exists():
        fix = "rename or move it, then run the same command with --resume to continue"
        raise InputError(f"{target} has appeared while its summaries were written", fix)
    write_json(done_path(target), fingerprint)
    joined = partials[0]
    if len(partials) > 1:
        joined = target.with_name(f".{target.name}.joined")
        descriptor = os.open(joined, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as out:
            for partial in partials:
                with open(partial, "rb") as file:
                    shutil.copyfileobj(file, out)
            out.flush()
            os.fsync(out.fileno())
    os.replace(joined, target)
    sync_dir(target.parent, with_files=False)
    remove_partials(partials)


def remove_partials(partials: list[Path]) -> None:
    for partial in partials:
        partial.unlink(missing_ok=True)
        record_path(partial).unlink(missing_ok=True)


# ------------------------------------------------------------------------------- the run


def summarize_file(notes: Notes, config: InferenceConfig, fingerprint: dict, summarize: Callable) -> None:
    """Summaries of all notes (id, text), in their order, to config.output_file or standard output.

    `fingerprint`: what a resumed run must share, hashes and settings. `summarize(window, should_stop=...)`
    takes notes by number and yields (number, result) as summaries end; it ends early once should_stop() is
    true. With several processes each takes a part of the notes, and the first joins their files. Raises
    Stopped after SIGTERM or Ctrl-C."""
    rank, n_processes = processes()
    bounds = [len(notes) * i // n_processes for i in range(n_processes + 1)]
    first, last = bounds[rank : rank + 2]
    target = Path(config.output_file) if config.output_file else None
    kind = target.suffix.lower() if target else ".jsonl" if config.json else ".txt"
    if target:
        header = ",".join(CSV_COLUMNS) + "\n" if kind == ".csv" and rank == 0 else ""
        own_fingerprint = {**fingerprint, "part of the notes": [first, last]}
        partial = partial_path(target, rank, n_processes)
        out = PartialFile(partial, kind, header, own_fingerprint, config.resume)
    else:
        out = StandardOutput(kind)
    remaining = range(first + out.n_done, last)
    if out.n_done:
        log(f"Resuming after {out.n_done:,} of {last - first:,} notes")
    started = time.perf_counter()
    try:
        _write_windows(notes, remaining, config.batch_size * WINDOW, out, summarize)
    except BaseException as error:
        if target:
            problem = f"not complete: {partial} holds {out.n_done:,} of {last - first:,} notes"
            message = f"{problem}; run the same command with --resume to continue"
            if isinstance(error, Stopped):
                raise Stopped(error.signal, message) from None
            log(f"\n{message}")
        raise
    finally:
        out.close()
    rate = f"; {len(remaining) / (time.perf_counter() - started):.2f} notes/s"
    _finish(target, fingerprint, out.counts, rate if n_processes == 1 else "")


def _write_windows(
    notes: Notes, remaining: range, size: int, out: PartialFile | StandardOutput, summarize: Callable
) -> None:
    """Summarizes the notes with the `remaining` numbers in windows of `size` notes, each added to `out` at
    its end."""
    progress = Progress(out.n_done + len(remaining), "note", done=out.n_done, interval=60)
    try:
        with noted_signals() as noted:
            for start in range(0, len(remaining), size):
                window = {number: notes[number][1] for number in remaining[start : start + size]}
                results = {}
                for number, result in summarize(window, should_stop=lambda: bool(noted)):
                    results[number] = {"id": notes[number][0], **result}
                    progress.advance()
                if len(results) < len(window):
                    raise Stopped(noted[0], "stopped: not all summaries are written")
                out.add([results[number] for number in window])
    finally:
        progress.close()


def _finish(target: Path | None, fingerprint: dict, counts: dict[str, int], rate: str) -> None:
    """Joins the partial files of all processes, on the first of them, and logs the last line."""
    rank, n_processes = processes()
    if target:
        if n_processes > 1:
            _wait_for_all()
        if rank > 0:
            return
        partials = [partial_path(target, i, n_processes) for i in range(n_processes)]
        records = [read_record(record_path(partial)) for partial in partials]
        counts = {name: sum(record["counts"][name] for record in records) for name in counts}
        join_partials(partials, target, fingerprint)
    written = f"; written to {target}" if target else ""
    done = f"{plural(counts['done'], 'note')} summarized ({counts['shortened']:,} of the notes shortened)"
    why = ' (see "error")' if target and counts["failed"] else ""
    log(f"{done}, {counts['failed']:,} failed{why}{rate}{written}")


def _wait_for_all() -> None:
    """Waits until every process is here. Raises RunError if one ends before."""
    from datetime import timedelta

    import torch.distributed

    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except RuntimeError:
        fix = "run the same command with --resume to continue"
        raise RunError("another process ended before its notes were done", fix) from None
