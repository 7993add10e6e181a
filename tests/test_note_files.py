"""Files of notes: formats, windows, resuming after a kill, several processes."""

import csv
import json
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
from conftest import assert_input_error, run_inference, run_python
from tiny import NOTES, write_csv

import sft_inference
from sft.cli import InputError, Stopped, run_script
from sft.inference.note_files import check_output, defuse, read_notes, summarize_file
from sft.options import InferenceConfig


@pytest.mark.parametrize("kind", [".txt", ".csv", ".jsonl"])
@pytest.mark.parametrize("out", [".jsonl", ".csv"])
def test_files_in_and_out(adapters, specialist, tmp_path, kind, out):
    source = tmp_path / f"notes{kind}"
    target = tmp_path / f"summaries{out}"
    notes = [note.replace("\n", " ") for note, _ in NOTES[:4]]
    if kind == ".txt":
        source.write_text("\n\n".join(notes))
        ids = ["1", "3", "5", "7"]
    else:
        notes[1] = 'Two\nlines, "quoted".'
        ids = ["a", "b", "c", "d"]
        rows = [*zip(ids, notes), ("e", " ")]
        if kind == ".csv":
            write_csv(source, rows, header=["id", "clinical_note"])
        else:
            source.write_text("".join(json.dumps({"id": i, "clinical_note": n}) + "\n" for i, n in rows))
    arguments = ["--model_path", adapters(), "--input_file", source, "--output_file", target]
    result = run_inference(*arguments, "--max_new_tokens", 15, "--batch_size", 2)
    assert result.returncode == 0, result.stderr
    written = target.read_text().splitlines(keepends=True)
    lines = list(csv.DictReader(written)) if out == ".csv" else [json.loads(line) for line in written]
    expected = [specialist.generate_summary(note, 15)["generated_summary"] for note in notes]
    summaries = [(line["id"], line["generated_summary"].removeprefix("'")) for line in lines[:4]]
    assert summaries == list(zip(ids, expected))
    n_failed = 0 if kind == ".txt" else 1
    assert len(lines) == 4 + n_failed
    assert f"4 notes summarized (0 of the notes shortened), {n_failed} failed" in result.stderr
    assert f"notes/s; written to {target}" in result.stderr
    assert not list(tmp_path.glob("*.partial"))
    assert target.stat().st_mode & 0o077 == 0


def test_spreadsheet_formulas_are_defused():
    cells = ["=1+1", "+1", "-1", "@x", "fine", "", -1.5]
    assert [defuse(cell) for cell in cells] == ["'=1+1", "'+1", "'-1", "'@x", "fine", "", -1.5]


def test_bad_rows_of_input_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"clinical_note": "ok"}\n{"text": 1}\n')
    with pytest.raises(InputError, match="line 2"):
        list(read_notes(tmp_path / "a.jsonl"))
    write_csv(tmp_path / "a.csv", [(1,)], header=["text"])
    with pytest.raises(
        InputError, match=r"must name clinical_note \(id optional\); or use --note_column text"
    ):
        list(read_notes(tmp_path / "a.csv"))


def test_rows_with_more_fields_than_columns_are_refused(tmp_path):
    """An unquoted comma would leave the summary of half a note."""
    (tmp_path / "a.csv").write_text(
        "id,clinical_note\n11,no fever\n12,fever, cough\n13,well,\nJo Doe,pain, severe\n"
    )
    with pytest.raises(
        InputError, match=r"more fields .*: row 3 \(id 12\), row 5 \(id \(not shown\)\)"
    ) as refused:
        list(read_notes(tmp_path / "a.csv"))
    assert not any(word in str(refused.value) for word in ("fever", "cough", "Doe", "pain"))


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_any_line_ends(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(end.join(["Fever.", "", "Cough.", ""]).encode())
    notes = [(row_id, note.strip()) for row_id, note in read_notes(tmp_path / "a.txt")]
    assert notes == [("1", "Fever."), ("3", "Cough.")]


def options(target, resume=False):
    return InferenceConfig(output_file=str(target), resume=resume, batch_size=1)


def made_up(window, should_stop):
    """Results that depend on the note, its number and the window it came in; the last notes end first."""
    for number, note in reversed(window.items()):
        if should_stop():
            return
        if note == "":
            yield number, {"generated_summary": "", "error": "empty"}
        else:
            warnings = ["note shortened: x"] if number % 5 == 0 else []
            text = f"{note!r} is {number} of {min(window)}"
            yield number, {"generated_summary": text, "warnings": warnings}


def test_ids_that_utf_8_cannot_hold_are_repaired(tmp_path):
    ids = ["a\ud83d", " b\x00 ", "", 7, None, "\ud83d\ude00"]
    rows = [json.dumps({"id": i, "clinical_note": "x"}) + "\n" for i in ids]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    source = list(read_notes(tmp_path / "a.jsonl"))
    repaired = ["a\ufffd", "b", "3", "7", "5", "\U0001f600"]
    assert [row_id for row_id, _ in source] == repaired
    summarize_file(source, options(tmp_path / "out.jsonl"), {}, made_up)
    written = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in written] == repaired


@pytest.mark.parametrize("json_lines", [False, True])
def test_standard_output(capsys, json_lines):
    config = InferenceConfig(batch_size=1, json=json_lines)
    summarize_file([("a", "x"), ("b", "")], config, {}, made_up)
    out, err = capsys.readouterr()
    if json_lines:
        assert [json.loads(line)["id"] for line in out.splitlines()] == ["a", "b"]
    else:
        assert out == "[a] 'x' is 0 of 0\n\n[b] empty\n\n"
    assert "1 note summarized (1 of the notes shortened), 1 failed; " in err


# ------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_a_file_interrupted_anywhere_ends_as_if_it_had_not_been(tmp_path, kind, capsys):
    notes = [(f"n{i}", f'=note,\n"{i}" ü' if i % 7 else "") for i in range(61)]
    whole = tmp_path / f"whole{kind}"
    fingerprint = {"adapter": "a"}
    summarize_file(notes, options(whole), fingerprint, made_up)
    assert (
        '52 notes summarized (11 of the notes shortened), 9 failed (see "error")' in capsys.readouterr().err
    )
    source = random.Random(0)
    target = tmp_path / f"out{kind}"
    partial = tmp_path / f"out{kind}.partial"
    n_interruptions = 0
    while not target.exists():
        n_left = source.randrange(1, 40)

        def interrupted(window, should_stop):
            nonlocal n_left
            for result in made_up(window, should_stop):
                n_left -= 1
                if n_left < 0:
                    raise KeyboardInterrupt
                yield result

        try:
            summarize_file(notes, options(target, resume=True), fingerprint, interrupted)
        except KeyboardInterrupt:
            n_interruptions += 1
            # As a kill leaves it: rows that no record counts, the last one incomplete
            with open(partial, "ab") as file:
                file.write(whole.read_bytes()[: source.randrange(50)])
    assert n_interruptions > 1
    assert target.read_bytes() == whole.read_bytes()
    assert (
        '52 notes summarized (11 of the notes shortened), 9 failed (see "error")' in capsys.readouterr().err
    )
    records = [f".out{kind}.done.json", f".whole{kind}.done.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*records, f"out{kind}", f"whole{kind}"]
    assert target.stat().st_mode & 0o077 == 0


def interrupted_later(window, should_stop):
    """Ends with Ctrl-C after the first window."""
    if min(window):
        raise KeyboardInterrupt
    yield from made_up(window, should_stop)


def test_a_file_that_the_previous_version_began_is_resumed(tmp_path):
    """Its record had `belongs_to` in the place of `fingerprint`."""
    notes = [(str(i), "x") for i in range(30)]
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        summarize_file(notes, options(target), {"adapter": "a"}, interrupted_later)
    record_file = tmp_path / "out.jsonl.partial.json"
    record = json.loads(record_file.read_text())
    assert record["done"] == 8
    record["belongs_to"] = record.pop("fingerprint")
    assert record["belongs_to"] == {"adapter": "a", "part of the notes": [0, 30]}
    record_file.write_text(json.dumps(record))
    with pytest.raises(InputError, match="different adapter"):
        summarize_file(notes, options(target, resume=True), {"adapter": "b"}, made_up)
    summarize_file(notes, options(target, resume=True), {"adapter": "a"}, made_up)
    assert len(target.read_text().splitlines()) == 30


def test_a_window_that_cannot_be_written_is_not_counted(tmp_path, capsys):
    """The message gives the notes that --resume will find."""
    notes = [(str(i), "x") for i in range(30)]
    target = tmp_path / "out.jsonl"

    def unwritable(window, should_stop):
        for number, result in made_up(window, should_stop):
            yield number, {**result, "generated_summary": "\ud83d"} if min(window) else result

    with pytest.raises(UnicodeEncodeError):
        summarize_file(notes, options(target), {}, unwritable)
    assert (
        "partial holds 8 of 30 notes; run the same command with --resume to continue"
        in capsys.readouterr().err
    )
    summarize_file(notes, options(target, resume=True), {}, made_up)
    assert "Resuming after 8 of 30 notes" in capsys.readouterr().err


def test_partial_files_of_other_runs_are_refused(tmp_path):
    notes = [(str(i), "x") for i in range(30)]
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fingerprint = {"adapter": "a", "seed": 1}
        summarize_file(notes, options(target, resume=True), fingerprint, interrupted_later)
    record = tmp_path / "out.jsonl.partial.json"
    with pytest.raises(InputError, match="--resume"):
        summarize_file(notes, options(target), {"adapter": "a", "seed": 1}, made_up)
    with pytest.raises(InputError, match="different adapter, seed"):
        summarize_file(notes, options(target, resume=True), {"adapter": "b", "seed": 2}, made_up)
    with pytest.raises(InputError, match="different part of the notes"):
        summarize_file(notes[:-1], options(target, resume=True), {"adapter": "a", "seed": 1}, made_up)
    assert "x" not in record.read_text().replace("max", "")  # no text of a note
    (tmp_path / "out.jsonl.partial").write_text("short")
    with pytest.raises(InputError, match="shorter"):
        summarize_file(notes, options(target, resume=True), {"adapter": "a", "seed": 1}, made_up)
    whole = json.loads(record.read_text())
    bad_values = ({"fingerprint": []}, {"belongs_to": []}, {"bytes": -5}, {"done": "3"}, {"counts": {}})
    for damaged in ("{", "[]", "5", *(json.dumps({**whole, **bad}) for bad in bad_values)):
        record.write_text(damaged)
        with pytest.raises(InputError, match="damaged"):
            summarize_file(notes, options(target, resume=True), {"adapter": "a", "seed": 1}, made_up)
    record.unlink()
    with pytest.raises(InputError, match=r"its record .* is missing or unreadable"):
        summarize_file(notes, options(target, resume=True), {"adapter": "a", "seed": 1}, made_up)
    assert (tmp_path / "out.jsonl.partial").read_text() == "short"


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_a_partial_file_killed_before_its_first_record(tmp_path, kind):
    target, partial = tmp_path / f"out{kind}", tmp_path / f"out{kind}.partial"
    for content in ("", "id,generated_summary,conf" if kind == ".csv" else ""):
        partial.write_text(content)
        summarize_file([("1", "x")], options(target, resume=True), {}, made_up)
        assert target.stat().st_mode & 0o077 == 0
        target.unlink()


def test_only_files_of_its_own_are_touched(tmp_path):
    """Other people's files whose names are like ours, files that appear meanwhile, symbolic links."""
    target, notes = tmp_path / "s[12].jsonl", [("1", "x")]
    strangers = [
        f"{target.name}.partial-notes.txt",
        "s1.jsonl.partial",
        "s2.jsonl.partial.json",
        f"{target.name}.partial-1-of-2",
    ]
    for name in strangers:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"partial-1-of-2 exists: the earlier run used a different number"):
        check_output(str(target), False, dict)
    (tmp_path / strangers[-1]).unlink()
    summarize_file(notes, options(target), {"seed": 1}, made_up)
    assert check_output(str(target), True, lambda: {"seed": 1})
    assert all((tmp_path / name).read_text() == "{}" for name in strangers[:-1])

    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "b.jsonl.partial").symlink_to(elsewhere)
    for content in (None, "precious"):
        if content:
            elsewhere.write_text(content)
        with pytest.raises(InputError, match="symbolic link"):
            summarize_file(notes, options(tmp_path / "b.jsonl", resume=True), {}, made_up)
    assert elsewhere.read_text() == "precious"

    def slowly(window, should_stop):
        (tmp_path / "c.jsonl").write_text("precious")
        return made_up(window, should_stop)

    with pytest.raises(InputError, match="has appeared"):
        summarize_file(notes, options(tmp_path / "c.jsonl"), {}, slowly)
    assert (tmp_path / "c.jsonl").read_text() == "precious"
    (tmp_path / "c.jsonl").unlink()
    # Nothing is left to be written
    summarize_file(notes, options(tmp_path / "c.jsonl", resume=True), {}, slowly)
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 1


def test_two_processes_cannot_write_one_file(tmp_path):
    target = tmp_path / "out.jsonl"
    refused = []

    def meanwhile(window, should_stop):
        with pytest.raises(InputError, match="another process is writing"):
            summarize_file([("1", "x")], options(target, resume=True), {}, made_up)
        refused.append(1)
        return made_up(window, should_stop)

    summarize_file([("1", "x")], options(target), {}, meanwhile)
    assert refused
    assert len(target.read_text().splitlines()) == 1


def test_a_name_with_no_room_for_its_partial_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="too long"):
        check_output(str(tmp_path / ("a" * 240 + ".jsonl")), False, dict)


def test_a_complete_file_of_another_run_is_refused(tmp_path):
    target = tmp_path / "out.jsonl"
    left = tmp_path / "out.jsonl.partial"
    summarize_file([("1", "x")], options(target), {"adapter": "a", "seed": 1}, made_up)
    left.write_text("left by a kill after the join")
    record = {
        "fingerprint": {"adapter": "a", "seed": 1, "part of the notes": [0, 1]},
        "done": 1,
        "bytes": 9,
        "counts": {"done": 0, "shortened": 0, "failed": 0},
    }
    (tmp_path / "out.jsonl.partial.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="different seed"):
        check_output(str(target), True, lambda: {"adapter": "a", "seed": 2})
    assert left.exists()
    assert check_output(str(target), True, lambda: {"adapter": "a", "seed": 1})
    assert not left.exists()
    assert not (tmp_path / "out.jsonl.partial.json").exists()
    with pytest.raises(InputError, match="exists"):
        check_output(str(target), False, lambda: {"adapter": "a", "seed": 1})
    for record in ("{", "5", None):
        if record is None:
            (tmp_path / ".out.jsonl.done.json").unlink()
        else:
            (tmp_path / ".out.jsonl.done.json").write_text(record)
        with pytest.raises(InputError, match=r"its record .* is missing or unreadable"):
            check_output(str(target), True, lambda: {"adapter": "a", "seed": 1})
    target.unlink()
    assert not check_output(str(target), True, dict)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_the_next_token(tmp_path, number, capsys):
    notes = [(str(i), "x") for i in range(20)]
    target = tmp_path / "out.jsonl"

    def signalled(window, should_stop):
        if min(window):
            assert not should_stop()
            os.kill(os.getpid(), number)
            assert should_stop()
        return made_up(window, should_stop)

    message = "holds 8 of 20 notes; run the same command with --resume to continue"
    with pytest.raises(Stopped, match=message) as stopped:
        summarize_file(notes, options(target), {}, signalled)
    assert stopped.value.signal == number
    assert "--resume" not in capsys.readouterr().err  # the script logs it, once
    summarize_file(notes, options(target, resume=True), {}, made_up)
    assert len(target.read_text().splitlines()) == 20


def test_no_file_is_created_if_no_note_fits(adapters, tmp_path):
    source, target = many_notes(tmp_path / "notes.csv", 2), tmp_path / "out.jsonl"
    arguments = ["--model_path", adapters(), "--input_file", source, "--output_file", target]
    assert_input_error(run_inference(*arguments, "--max_new_tokens", 9000), "leaves no room")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.csv"]


def many_notes(path, n=60):
    source = random.Random(0)
    texts = [
        " ".join(source.choices([note for note, _ in NOTES], k=source.randrange(1, 6))) for _ in range(n)
    ]
    return write_csv(path, enumerate(texts), header=["id", "clinical_note"])


def run_cli(arguments, stderr, environment):
    """sft_inference.py in a process that has its imports already."""
    os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = ["sft_inference.py", "--device", "cpu", *arguments]
    run_script(sft_inference.main)


@pytest.fixture
def start(tmp_path):
    """start(*arguments, **environment): (process, file of its standard error). They are forked from a server
    that only imports, since starting Python and torch takes most of the time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sft_inference", "sft.inference.generate", "sft.model.adapter"])

    def make(*arguments, **environment):
        stderr = tmp_path / f"stderr-{time.monotonic_ns()}"
        arguments = [str(argument) for argument in arguments]
        process = context.Process(target=run_cli, args=(arguments, stderr, environment))
        process.start()
        return process, stderr

    return make


def finished(process, stderr):
    process.join(120)
    return process.exitcode, stderr.read_text()


def test_kills_and_terminations(adapters, tmp_path, start):
    """SIGKILL and SIGTERM while the file is being written. Sampled summaries, since greedy ones would hide a
    mistake in the seeds."""
    source = many_notes(tmp_path / "notes.csv")
    whole = tmp_path / "whole.jsonl"
    target = tmp_path / "out.jsonl"
    arguments = ["--model_path", adapters(), "--input_file", source]
    arguments += ["--max_new_tokens", 20, "--batch_size", 1, "--temperature", 0.7]
    status, err = finished(*start(*arguments, "--output_file", whole))
    assert status == 0, err
    assert "60 notes summarized" in err
    partial = tmp_path / "out.jsonl.partial"
    sizes = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = partial.stat().st_size if partial.exists() else 0
        process, stderr = start(*arguments, "--output_file", target, "--resume")
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size > before):
            assert process.is_alive() and time.monotonic() < deadline, stderr.read_text()
            time.sleep(0.01)
        os.kill(process.pid, number)
        status, err = finished(process, stderr)
        sizes.append(partial.stat().st_size)
        assert not target.exists()
        assert status == (-9 if number == signal.SIGKILL else 143)
    assert err.count("--resume to continue") == 1
    assert NOTES[0][0] not in err
    assert "Traceback" not in err
    assert 0 < sizes[0] < sizes[1]
    status, err = finished(*start(*arguments, "--output_file", target))
    assert status == 2
    assert "--resume" in err
    status, err = finished(*start(*arguments, "--output_file", target, "--resume"))
    assert status == 0, err
    assert "Resuming after" in err
    assert "60 notes summarized" in err
    assert target.read_bytes() == whole.read_bytes()
    status, err = finished(*start(*arguments, "--output_file", target, "--resume"))
    assert status == 0, err
    assert "complete" in err
    status, err = finished(*start(*arguments, "--output_file", target, "--resume", "--seed", 1))
    assert status == 2
    assert "different seed" in err


def test_several_processes(adapters, specialist, tmp_path):
    source = many_notes(tmp_path / "notes.csv", 7)
    target = tmp_path / "out.csv"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    options = ["--model_path", adapters(), "--input_file", source, "--output_file", target]
    options += ["--device", "cpu", "--max_new_tokens", 8, "--batch_size", 1, "--temperature", 0.7]
    result = run_python(*torchrun, "sft_inference.py", *options)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("7 notes summarized") == 1
    with open(target, newline="") as file:
        written = [(row["id"], row["generated_summary"].removeprefix("'")) for row in csv.DictReader(file)]
    ids, notes = zip(*read_notes(source))
    expected = specialist.generate_batch(notes, 8, 0.7, batch_size=1)
    assert written == list(zip(ids, (result["generated_summary"] for result in expected)))
    assert not list(tmp_path.glob("*.partial*"))
