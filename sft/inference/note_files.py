"""A file of notes in, a file of summaries out: formats, going on after an interruption, several processes.

Notes are summarised in windows of WINDOW batches: sorted by length inside a window, written in input order at its end.
Until all is done the output is FILE.partial; beside it FILE.partial.json says what it belongs to and how many bytes of it
are whole windows. What was written after that is computed again, so a resumed file is the same to the byte. Beside the
complete output .FILE.done.json goes on saying what it belongs to.
"""

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

from sft.cli import InputError, RunError, Stopped, log, noted_signals, preview_list, safe_id
from sft.data.rows import read_table
from sft.data.text import clean_text, decode_text
from sft.files import check_new_file, sync_dir, write_json

WINDOW = (
    8  # batches between two writes: the tail of a window, where the batch is no longer full, costs little
)
PROGRESS_SECONDS = 60  # between two lines of progress where standard error is no terminal


# ------------------------------------------------------------------------------------------------ formats


def read_notes(path: str | Path) -> Iterator[tuple[str, object]]:
    """Yields (id, note) of a .txt, .csv or .jsonl file; where there is no id the row's number stands for it, and a note
    of .jsonl may be no text. Raises InputError where the file cannot be read."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".csv":
        bad = []
        for row_number, fields, too_many in read_table(path, ("clinical_note",)):
            row_id = fields.get("id", "").strip() or str(row_number)
            if too_many:
                bad.append(f"row {row_number:,} (id {safe_id(row_id)})")
            yield row_id, fields.get("clinical_note", "")
        if bad:
            raise InputError(
                f"{path}: more fields than the header has columns (a comma outside quotes?): {preview_list(bad)}",
                "fix these rows",
            )
        return
    if kind not in (".txt", ".jsonl"):
        raise InputError(f"{path}: the ending says no format", "use .txt (one note a line), .csv or .jsonl")
    for line_number, line in enumerate(io.StringIO(decode_text(path), newline=None), 1):
        if not line.strip():
            continue
        if kind == ".txt":
            yield str(line_number), line
            continue
        try:
            row = json.loads(line)
            note = row["clinical_note"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f"{path}: line {line_number}: no JSON object with a clinical_note", "write one object a line"
            ) from None
        row_id = row.get("id")
        yield (clean_text(str(row_id)) if isinstance(row_id, str | int) else "") or str(line_number), note


def defuse(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return "'" + cell if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


CSV_COLUMNS = (
    "id",
    "generated_summary",
    "confidence",
    "finish_reason",
    "n_prompt_tokens",
    "n_new_tokens",
    "warnings",
    "evidence",
    "error",
)


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


# ------------------------------------------------------------------------------------------------ a file that can go on


class PartialFile:
    """FILE.partial and its record. `record` holds `belongs_to` (hashes and settings, no text), `done` (notes), `bytes`
    and `counts`.

    Raises InputError where a partial file is there and `resume` is not asked for, or belongs to something else.
    """

    def __init__(self, path: Path, belongs_to: dict, resume: bool, header: str):
        self.path, self.record_path = path, path.with_name(path.name + ".json")
        self.record = {
            "belongs_to": belongs_to,
            "done": 0,
            "bytes": 0,
            "counts": {"done": 0, "shortened": 0, "failed": 0},
        }
        if path.is_symlink():
            raise InputError(
                f"{path} is a symbolic link", "move it away: summaries are written to a file of their own"
            )
        if path.exists() and not resume:
            raise InputError(
                f"{path} is there: an earlier run was interrupted",
                "add --resume to go on from it, or delete it",
            )
        begun = path.exists() and self.record_path.exists()
        self.file = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600), "r+b"
        )
        try:
            lock(self.file, path)
            if begun:
                self.record = read_record(self.record_path)
                fix = "give the same files and options, or delete it and its .json and start anew"
                check_same_run(path, self.record["belongs_to"], belongs_to, fix)
                if path.stat().st_size < self.record["bytes"]:
                    raise InputError(
                        f"{path} is shorter than its record says", "delete it and its .json, and start anew"
                    )
            elif not header.encode().startswith(
                self.file.read(len(header) + 1)
            ):  # more than a start that was broken off
                raise InputError(
                    f"{path} is there, and no record ({self.record_path.name}) says what it belongs to",
                    "move it away",
                )
        except InputError:
            self.file.close()
            raise
        os.chmod(path, 0o600)
        self.file.truncate(self.record["bytes"])
        self.file.seek(self.record["bytes"])
        if not begun:
            self.add(header, {})

    def add(self, text: str, counts: dict[str, int], n_notes: int = 0) -> None:
        """Appends one window; it counts once the record has followed."""
        self.file.write(text.encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.record["bytes"], self.record["done"] = self.file.tell(), self.record["done"] + n_notes
        for name, count in counts.items():
            self.record["counts"][name] += count
        write_json(self.record_path, self.record)


def lock(file, path: Path) -> None:
    """Keeps others from writing to `file` until it is closed or the process ends, however. Raises InputError where another
    process has done so."""
    with contextlib.suppress(ImportError):  # not on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is writing {path}", "wait for it, or name another --output_file"
            ) from None
        except OSError:  # a file system without locks
            pass


def read_record(path: Path) -> dict:
    """A partial file's record. Raises InputError where it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        numbers = (
            record["bytes"],
            record["done"],
            *(record["counts"][name] for name in ("done", "shortened", "failed")),
        )
        whole = isinstance(record["belongs_to"], dict) and all(isinstance(n, int) and n >= 0 for n in numbers)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"{path} is damaged", f"delete it and {path.stem}, and start anew")
    return record


def check_same_run(path: Path, before: dict, belongs_to: dict, fix: str) -> None:
    other = sorted(
        name for name in before.keys() | belongs_to.keys() if before.get(name) != belongs_to.get(name)
    )
    if other:
        raise InputError(f"{path} belongs to a run with another {', '.join(other)}", fix)


class StandardOutput:
    """The same for standard output, where nothing can go on."""

    def __init__(self):
        self.file, self.record = sys.stdout, {"done": 0, "counts": {"done": 0, "shortened": 0, "failed": 0}}

    def add(self, text: str, counts: dict[str, int], n_notes: int) -> None:
        self.file.write(text)
        self.file.flush()
        for name, count in counts.items():
            self.record["counts"][name] += count


def join_partials(parts: list[Path], target: Path, belongs_to: dict) -> None:
    """Moves the finished partial files, end to end, to `target`, which appears whole or not at all, after its record.
    Raises InputError where another file has appeared there."""
    if target.exists():
        raise InputError(
            f"{target} has appeared while its summaries were written",
            "move it away; the same command with --resume ends this",
        )
    write_json(done_path(target), belongs_to)
    if len(parts) > 1:
        with open(
            os.open(
                aside := target.with_name(f".{target.name}.joined"),
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
                0o600,
            ),
            "wb",
        ) as out:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(aside, target)
    else:
        os.replace(parts[0], target)
    sync_dir(target.parent, inside=False)
    for part in parts:
        part.unlink(missing_ok=True)
        part.with_name(part.name + ".json").unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ the run


def processes() -> tuple[int, int]:
    """(number of this process, number of processes), as torchrun and accelerate say in the environment."""
    try:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        raise InputError(
            "the environment's RANK or WORLD_SIZE is no number", "unset them, or start with torchrun"
        ) from None


def partial_path(target: Path, rank: int, n_processes: int) -> Path:
    return target.with_name(
        f"{target.name}.partial" + (f"-{rank + 1}-of-{n_processes}" if n_processes > 1 else "")
    )


def partial_paths(target: Path) -> list[Path]:
    """Partial files of `target` that are there, of any number of processes, and those whose record alone is."""
    pattern = re.compile(re.escape(target.name) + r"\.partial(-\d+-of-\d+)?(\.json)?")
    names = {
        path.name.removesuffix(".json") for path in target.parent.iterdir() if pattern.fullmatch(path.name)
    }
    return [target.with_name(name) for name in sorted(names)]


def done_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.done.json")


def check_output(output_file: str, resume: bool, belongs_to: Callable[[], dict]) -> bool:
    """Whether the output file is complete already. Raises InputError where it cannot be written or begun, or belongs to
    something else than `belongs_to()`."""
    target = Path(output_file)
    if resume and target.exists():
        try:
            before = dict(json.loads(done_path(target).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            raise InputError(
                f"{target} exists, and no record ({done_path(target).name}) says what it belongs to",
                "name another, or move it away",
            ) from None
        check_same_run(target, before, belongs_to(), "name another --output_file, or move it away")
        for path in partial_paths(
            target
        ):  # of this run, killed after the join: they have nothing more to tell
            record = path.with_name(path.name + ".json")
            with contextlib.suppress(
                InputError, FileNotFoundError
            ):  # without a whole record it is not known to be of this run
                if before.items() <= read_record(record)["belongs_to"].items():
                    path.unlink(missing_ok=True)
                    record.unlink()
        return True
    check_new_file("--output_file", output_file, (".jsonl", ".csv"))
    if len(os.fsencode(target.name)) > 200:  # what is added to it while it is not complete must fit too
        raise InputError("--output_file: the name is too long", "give one of at most 200 bytes")
    rank, n_processes = processes()
    own = partial_path(target, rank, n_processes)
    others = [path for path in partial_paths(target) if path.exists()]
    expected = {partial_path(target, i, n_processes) for i in range(n_processes)}
    odd = sorted(path.name for path in others if path not in expected)
    if odd:
        raise InputError(
            f"{odd[0]} is there: an earlier run had another number of processes",
            "go on with as many, or delete it",
        )
    if own.exists() and not resume:
        raise InputError(
            f"{own} is there: an earlier run was interrupted", "add --resume to go on from it, or delete it"
        )
    return False


class Progress:
    """Notes done, notes/s and time left: a bar on a terminal, else a line a minute. Silent in all processes but the first."""

    def __init__(self, total: int, quiet: bool):
        from tqdm import tqdm

        self.bar = tqdm(total=total, unit="note", file=sys.stderr, disable=True if quiet else None)
        self.total, self.quiet, self.done, self.started = total, quiet, 0, time.perf_counter()
        self.spoken = self.started

    def tick(self) -> None:
        self.bar.update()
        self.done, now = self.done + 1, time.perf_counter()
        if self.bar.disable and not self.quiet and now - self.spoken > PROGRESS_SECONDS:
            rate, self.spoken = self.done / (now - self.started), now
            log(
                f"  {self.done:,} of {self.total:,} notes, {rate:.2f} notes/s, {(self.total - self.done) / rate / 60:,.0f} min left"
            )


def count(results: list[dict]) -> dict[str, int]:
    failed = sum("error" in result for result in results)
    shortened = sum(
        any(warning.startswith("note shortened") for warning in result.get("warnings", []))
        for result in results
    )
    return {"done": len(results) - failed, "shortened": shortened, "failed": failed}


def summarize_file(notes: list[tuple[str, object]], config, belongs_to: dict, summarize: Callable) -> None:
    """Summaries of all notes, in their order, to config.output_file or standard output.

    `belongs_to`: what a resumed run must share, hashes and settings. `summarize(list of notes, number of the first, on_done,
    on_token)` gives their results and calls `on_done()` as each is done, `on_token(...)` after each token. With several
    processes each takes a part of the notes, and the first joins their files. Raises Stopped after SIGTERM or Ctrl-C.
    """
    rank, n_processes = processes()
    bounds = [len(notes) * i // n_processes for i in range(n_processes + 1)]
    first, last = bounds[rank], bounds[rank + 1]
    target = Path(config.output_file) if config.output_file else None
    kind = target.suffix.lower() if target else ".jsonl" if config.json else ".txt"
    header = ",".join(CSV_COLUMNS) + "\n" if kind == ".csv" and rank == 0 else ""
    own = partial_path(target, rank, n_processes) if target else None
    out = (
        PartialFile(own, {**belongs_to, "part of the notes": [first, last]}, config.resume, header)
        if own
        else StandardOutput()
    )
    begun, started = first + out.record["done"], time.perf_counter()
    if begun > first:
        log(f"Going on after {begun - first:,} of {last - first:,} notes")
    progress, window = Progress(last - begun, quiet=rank > 0), config.batch_size * WINDOW
    try:
        with noted_signals() as noted:

            def stop_if_asked(_) -> None:
                if noted:
                    raise Stopped(noted[0], "stopped: not all summaries are written")

            for start in range(begun, last, window):
                part = notes[start : min(start + window, last)]
                results = summarize([note for _, note in part], start, progress.tick, stop_if_asked)
                results = [{"id": note_id, **result} for (note_id, _), result in zip(part, results)]
                out.add(
                    "".join(format_result(result, kind) for result in results), count(results), len(results)
                )
    except BaseException as error:
        if own:
            where = f"not complete: {own} holds {out.record['done']:,} of {last - first:,} notes; the same command with --resume goes on"
            if isinstance(error, Stopped):
                raise Stopped(error.signal, where) from None
            log(f"\n{where}")
        raise
    finally:
        progress.bar.close()
        if own:
            out.file.close()
    totals, where = out.record["counts"], ""
    if own:
        if n_processes > 1:
            wait_for_all()
        if rank > 0:
            return
        paths = [partial_path(target, i, n_processes) for i in range(n_processes)]
        records = [
            json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8")) for path in paths
        ]
        totals = {name: sum(record["counts"][name] for record in records) for name in totals}
        join_partials(paths, target, belongs_to)
        where = f", written to {target}"
    rate = f"; {(last - begun) / (time.perf_counter() - started):.2f} notes/s" if n_processes == 1 else ""
    log(
        f"{totals['done']:,} done, {totals['shortened']:,} of them shortened, {totals['failed']:,} failed{rate}{where}"
    )


def wait_for_all() -> None:
    """Until every process has come here. Raises RunError where one ends before."""
    from datetime import timedelta

    import torch.distributed

    try:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except RuntimeError:
        raise RunError(
            "another process ended before its notes were done", "the same command with --resume goes on"
        ) from None
