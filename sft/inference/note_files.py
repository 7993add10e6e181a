"""A file of summaries out: resuming after an interruption, several processes.

Notes are summarized in windows of WINDOW batches, sorted by length inside a window. Until all is done the
output is FILE.partial, JSON Lines: first the run's fingerprint (hashes and settings, no text), then
{"number", "result"} for each summary as it ends. At the end they are written to FILE in the order of the
notes, and .FILE.done.json keeps the fingerprint. The batch that a note is in moves the last digit of its
confidence now and then: a window that was interrupted is therefore computed again whole, and its finished
summaries stay as they are, so that a resumed file is identical to the byte."""

import contextlib
import filecmp
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sft.cli import InputError, Progress, RunError, Stopped, log, noted_signals, plural, processes
from sft.files import check_new_file, lock, sync_dir, write_json
from sft.inference.notes import Note
from sft.inference.results import csv_columns, csv_row, format_result, kinds_of, needs_review, to_json
from sft.options import InferenceConfig

# Batches between two windows: their ends, when the batch is no longer full, cost little
WINDOW = 8


# ------------------------------------------------------------------------------- outputs


class StandardOutput:
    """Results to standard output, which cannot be resumed: in the order of the notes, each as soon as those
    before it are there."""

    def __init__(self, kind: str):
        self.kind = kind
        self.done: set[int] = set()
        self.counts = Counter()
        self.waiting: dict[int, dict] = {}
        self.next = 0

    def add(self, number: int, result: dict) -> None:
        self.waiting[number] = result
        while self.next in self.waiting:
            self._print(self.next)
            self.next += 1
        self.done.add(number)

    def _print(self, number: int) -> None:
        result = self.waiting.pop(number)
        self.counts.update(kinds_of(result))
        sys.stdout.write(format_result(result, self.kind, sys.stdout))
        sys.stdout.flush()

    def sync(self) -> None:
        """Prints what an interruption left behind a gap."""
        for number in sorted(self.waiting):
            self._print(number)

    close = sync


class PartialFile:
    """FILE.partial, locked. `done`: the numbers of the notes whose results it holds. Raises InputError for a
    link, and for the file of another run."""

    def __init__(self, path: Path, fingerprint: dict):
        self.path = path
        self.done: set[int] = set()
        if path.is_symlink():
            fix = "rename or move it: summaries are written to a file of their own"
            raise InputError(f"{path} is a symbolic link", fix)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        self.file = os.fdopen(os.open(path, flags, 0o600), "r+b")
        try:
            fix = "wait for it, or choose another --output_file"
            lock(self.file, f"another process is writing {path}", fix)
            first_line = to_json({"fingerprint": fingerprint}).encode() + b"\n"
            n_bytes = self._read_done(first_line, fingerprint)
        except BaseException:
            self.file.close()
            raise
        os.chmod(path, 0o600)
        # What a kill left of a line is computed again
        self.file.seek(n_bytes)
        self.file.truncate()
        if not n_bytes:
            self.file.write(first_line)
            self.sync()

    def _read_done(self, first_line: bytes, fingerprint: dict) -> int:
        """Reads `done`; returns how many bytes are complete lines."""
        line = self.file.readline()
        # All that a run leaves that was killed before its first line
        if not line.endswith(b"\n") and first_line.startswith(line):
            return 0
        recorded = parse_line(line).get("fingerprint")
        if not isinstance(recorded, dict):
            problem = f"{self.path} exists, but does not begin with the record of a run of this version"
            raise InputError(f"{problem}, so this run cannot be matched to it", "rename or move it")
        fix = "use the same files and options, or delete it to start over"
        check_fingerprint(self.path, recorded, fingerprint, fix)
        n_bytes = len(line)
        for number, _, line in read_results(self.file):
            self.done.add(number)
            n_bytes += len(line)
        return n_bytes

    def add(self, number: int, result: dict) -> None:
        self.file.write(to_json({"number": number, "result": result}).encode(errors="replace") + b"\n")
        self.file.flush()
        self.done.add(number)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        # On a full disk the last line stays behind incomplete
        with contextlib.suppress(OSError):
            self.file.close()


def parse_line(line: bytes) -> dict:
    """The JSON object of a complete line; {} for any other."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else {}
    except (ValueError, RecursionError):
        value = {}
    return value if isinstance(value, dict) else {}


def read_results(file) -> Iterator[tuple[int, dict, bytes]]:
    """(number, result, line) of the complete lines of a partial file that follow, up to the first that is
    not."""
    for line in file:
        entry = parse_line(line)
        if not isinstance(entry.get("number"), int) or not isinstance(entry.get("result"), dict):
            return
        yield entry["number"], entry["result"], line


# ------------------------------------------------------------------------------- records and names


def check_fingerprint(path: Path, recorded: dict, fingerprint: dict, fix: str) -> None:
    """Raises InputError if the two fingerprints differ. What older runs recorded besides cannot change a
    result."""
    different = [name for name in sorted(fingerprint) if recorded.get(name) != fingerprint[name]]
    if different:
        raise InputError(f"{path} was written with a different {', '.join(different)}", fix)


def done_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.done.json")


def partial_path(target: Path, rank: int, n_processes: int) -> Path:
    part = f"-{rank + 1}-of-{n_processes}" if n_processes > 1 else ""
    return target.with_name(f"{target.name}.partial{part}")


def existing_partials(target: Path) -> list[Path]:
    """Partial files of `target`, of any number of processes."""
    pattern = re.compile(re.escape(target.name) + r"\.partial(-\d+-of-\d+)?")
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))


def check_output(config: InferenceConfig, fingerprint: Callable[[], dict]) -> Counter | None:
    """The counts of config.output_file if it is complete already. Raises InputError if it, or the review
    file, cannot be written, or is another run's."""
    target = Path(config.output_file)
    if target.is_symlink():
        raise InputError(f"--output_file {target} is a symbolic link", "name the file that it points to")
    if config.resume and target.is_file():
        return _check_complete(target, fingerprint())
    # The names of the partial files and their records must fit too
    for option_name, name in (("--output_file", target.name), ("--review_file", config.review_file or "")):
        if len(os.fsencode(Path(name).name)) > 200:
            raise InputError(f"{option_name}: the name is too long", "choose one of at most 200 bytes")
    check_new_file("--output_file", target, (".jsonl", ".csv"))
    partials = existing_partials(target)
    # A review file that a killed run left is compared at the end with what this run would write
    if not (config.resume and partials):
        check_new_file("--review_file", config.review_file, (".jsonl", ".csv"))
    rank, n_processes = processes()
    others = set(partials) - {partial_path(target, i, n_processes) for i in range(n_processes)}
    if others:
        problem = f"{min(others).name} exists: the earlier run used a different number of processes"
        raise InputError(problem, "use the same number with --resume, or delete it")
    partial = partial_path(target, rank, n_processes)
    if partial.exists() and not config.resume:
        fix = "add --resume to continue it, or delete it"
        raise InputError(f"{partial} exists: an earlier run was interrupted", fix)
    return None


def _check_complete(target: Path, fingerprint: dict) -> Counter:
    """The counts of `target`. Raises InputError unless this run wrote it; removes its partial files, if it
    was killed before that."""
    fix = "rename or move it, or choose another --output_file"
    try:
        recorded = dict(json.loads(done_path(target).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        problem = f"{target} exists, but its record {done_path(target).name} is missing or unreadable"
        raise InputError(f"{problem}, so this run cannot be matched to it", fix) from None
    check_fingerprint(target, recorded, fingerprint, fix)
    for partial in existing_partials(target):
        # Without an intact record it is not known to be this run's, and stays
        with open(partial, "rb") as file:
            found = parse_line(file.readline()).get("fingerprint")
        if isinstance(found, dict) and fingerprint.items() <= found.items():
            partial.unlink()
    return Counter(recorded.get("counts", {}))


# ------------------------------------------------------------------------------- joining


def join_partials(partials: list[Path], config: InferenceConfig, fingerprint: dict) -> Counter:
    """Writes the results of complete partial files, in the order of the notes, to config.output_file, and
    those that a person should review to config.review_file. Both appear whole or not at all, the output last,
    after its record; returns the counts. Raises InputError if another file has appeared there."""
    targets = [Path(name) for name in (config.output_file, config.review_file) if name]
    joined = [target.with_name(f".{target.name}.joined") for target in targets]
    try:
        separator = fingerprint.get("separator", ",")
        counts = _write_joined(partials, joined, targets, config.max_risk, separator)
        for new, target in zip(joined, targets):
            # A review file with the same content is what an interrupted run left
            is_output = target == targets[0]
            if target.exists() and (is_output or not filecmp.cmp(new, target, shallow=False)):
                fix = "rename or move it, then run the same command with --resume to continue"
                raise InputError(f"{target} has appeared while its summaries were written", fix)
        write_json(done_path(targets[0]), {**fingerprint, "counts": counts})
        for new, target in reversed(list(zip(joined, targets))):
            os.replace(new, target)
            sync_dir(target.parent, with_files=False)
    finally:
        for path in joined:
            path.unlink(missing_ok=True)
    for partial in partials:
        partial.unlink()
    return counts


def _write_joined(
    partials: list[Path], joined: list[Path], targets: list[Path], max_risk: float | None, separator: str
) -> Counter:
    """Writes new private files with the contents of `targets`; returns the counts."""
    counts = Counter()
    with contextlib.ExitStack() as stack:
        files = []
        for path in joined:
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            files.append(
                stack.enter_context(open(descriptor, "w", encoding="utf-8", errors="replace", newline=""))
            )
        kinds = [target.suffix.lower() for target in targets]
        for result in _in_order(partials):
            for file, kind in zip(files, kinds):
                if kind == ".csv" and not counts:
                    # Excel takes a file for UTF-8 only with the mark
                    file.write("\ufeff" + csv_row(csv_columns(result), separator))
            place = int(needs_review(result, max_risk))
            files[place].write(format_result(result, kinds[place], separator=separator))
            counts.update([*kinds_of(result), *["for review"] * place])
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    return counts


def _in_order(partials: list[Path]) -> Iterator[dict]:
    """The results of each file sorted by number, with only the places of its lines in memory."""
    for partial in partials:
        with open(partial, "rb") as file:
            place = len(file.readline())
            places = []
            for number, _, line in read_results(file):
                places.append((number, place))
                place += len(line)
            for _, place in sorted(places):
                file.seek(place)
                yield parse_line(file.readline())["result"]


def _join_when_all_are_done(config: InferenceConfig, fingerprint: dict) -> Counter:
    """Joins the partial files of all processes, on the first of them. Raises RunError if another one ends
    before."""
    rank, n_processes = processes()
    if n_processes > 1:
        from datetime import timedelta

        import torch.distributed

        # Python's own handler would wait for the others too; all that is written is complete
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        except RuntimeError:
            fix = "run the same command with --resume to continue"
            raise RunError("another process ended before its notes were done", fix) from None
    if rank > 0:
        return Counter()
    partials = [partial_path(Path(config.output_file), i, n_processes) for i in range(n_processes)]
    return join_partials(partials, config, fingerprint)


# ------------------------------------------------------------------------------- the run


def summarize_file(
    notes: Sequence[Note], config: InferenceConfig, fingerprint: dict, summarize: Callable
) -> None:
    """Summaries of all notes, in their order, to config.output_file or standard output.

    `fingerprint`: what a resumed run must share, hashes and settings. `summarize(window, should_stop=...)`
    takes notes by number and yields (number, result) as summaries end; it ends early once should_stop() is
    true. With several processes each takes a part of the notes, and the first joins their files. Raises
    Stopped after SIGTERM or Ctrl-C, RunError at the end if all notes failed (with fail_on_error: if any)."""
    rank, n_processes = processes()
    first, last = (len(notes) * i // n_processes for i in (rank, rank + 1))
    out = StandardOutput(".jsonl" if config.json else ".txt")
    if config.output_file:
        partial = partial_path(Path(config.output_file), rank, n_processes)
        out = PartialFile(partial, {**fingerprint, "part of the notes": [first, last]})
    n_before = len(out.done)
    if n_before:
        log(f"Resuming after {n_before:,} of {plural(last - first, 'note')}")
    started = time.perf_counter()
    try:
        _write_windows(notes, range(first, last), config.batch_size, out, summarize)
    except BaseException as error:
        state = f"{len(out.done):,} of {plural(last - first, 'note')}"
        message = f"stopped: {state} summarized, the others are not"
        if config.output_file:
            message = f"not complete: {partial} holds {state}; run the same command with --resume to continue"
        if isinstance(error, Stopped):
            raise Stopped(error.signal, message) from None
        log(f"\n{message}")
        raise
    finally:
        out.close()
    rate = f"; {(last - first - n_before) / (time.perf_counter() - started):.2f} notes/s"
    counts = _join_when_all_are_done(config, fingerprint) if config.output_file else out.counts
    if rank == 0:
        report(counts, rate if n_processes == 1 else "", config)


def _write_windows(
    notes: Sequence[Note],
    numbers: range,
    batch_size: int,
    out: PartialFile | StandardOutput,
    summarize: Callable,
) -> None:
    """Summarizes the notes with these numbers in windows; each result goes to `out` as it ends."""
    # On a screen or in a pipe the next results are waited for
    size = batch_size * (WINDOW if isinstance(out, PartialFile) else 1)
    with (
        contextlib.closing(Progress(len(numbers), "note", done=len(out.done), interval=60)) as progress,
        noted_signals("finished summaries are kept") as noted,
    ):
        for start in range(numbers.start, numbers.stop, size):
            window = range(start, min(start + size, numbers.stop))
            if out.done.issuperset(window):
                continue
            texts = {number: notes[number].text for number in window}
            for number, result in summarize(texts, should_stop=lambda: bool(noted)):
                if number not in out.done:
                    note = notes[number]
                    out.add(number, {"id": note.id, "row": note.row, **note.kept, **result})
                    progress.advance()
            if not out.done.issuperset(window):
                raise Stopped(noted[0], "stopped: not all summaries are written")
            out.sync()


def report(counts: Counter, rate: str, config: InferenceConfig) -> None:
    """Logs what came of the notes, by kind. Raises RunError as `summarize_file` says."""
    n_failed = counts["failed"]
    n_quoted = counts["sentence quoted"]
    n_sentences = n_quoted + counts["sentence written"]
    apart = {"done", "failed", "flagged", "for review", "sentence quoted", "sentence written"}
    for kind in sorted(counts.keys() - apart):
        log(f"warning: {plural(counts[kind], 'note')}: {kind}")
    if n_sentences:
        log(f"{n_quoted:,} of {plural(n_sentences, 'sentence')} are the notes' own words")
    elif counts["done"]:
        log("all of it is written freely by the model, which may invent: read each summary beside its note")
    if counts["flagged"]:
        share = counts["flagged"] / counts["done"]
        log(f"The check flagged {counts['flagged']:,} of {counts['done']:,} summaries ({share:.0%})")
    if config.review_file:
        why = f"with a check_risk above {config.max_risk:g}, or not checked, are in {config.review_file}"
        log(f"{counts['for review']:,} of the summaries, {why}")
    shortened = f"{counts['note shortened']:,} of the notes shortened"
    see = ' (see "error")' if config.output_file and n_failed else ""
    written = f"; written to {config.output_file}" if config.output_file else ""
    done = f"{plural(counts['done'], 'note')} summarized ({shortened})"
    log(f"{done}, {n_failed:,} failed{see}{rate}{written}")
    if n_failed and (config.fail_on_error or not counts["done"]):
        n = f"all {plural(n_failed, 'note')}" if not counts["done"] else plural(n_failed, "note")
        raise RunError(f"{n} failed", 'see "error" in the output for the reasons')
