"""Files of notes: formats, windows, going on after a kill, several processes."""

import csv
import json
import mmap
import multiprocessing
import os
import random
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_input_error, run_inference, run_python
from tiny import NOTES, write_csv

import sft_inference
from sft.cli import InputError, RunError, Stopped, is_out_of_memory, run_script
from sft.inference.note_files import check_output, defuse, read_notes, summarize_file


@pytest.mark.parametrize("kind", [".txt", ".csv", ".jsonl"])
@pytest.mark.parametrize("out", [".jsonl", ".csv"])
def test_files_in_and_out(adapters, specialist, tmp_path, kind, out):
    source, target = tmp_path / f"notes{kind}", tmp_path / f"summaries{out}"
    notes = [note.replace("\n", " ") for note, _ in NOTES[:4]]
    if kind == ".txt":
        source.write_text("\n\n".join(notes))
        ids = ["1", "3", "5", "7"]
    else:
        notes[1], ids = 'Two\nlines, "quoted".', ["a", "b", "c", "d"]
        if kind == ".csv":
            write_csv(source, [*zip(ids, notes), ("e", " ")], header=["id", "clinical_note"])
        else:
            source.write_text(
                "".join(
                    json.dumps({"id": i, "clinical_note": n}) + "\n" for i, n in [*zip(ids, notes), ("e", "")]
                )
            )
    result = run_inference(
        "--model_path",
        adapters(),
        "--input_file",
        source,
        "--output_file",
        target,
        "--max_new_tokens",
        15,
        "--batch_size",
        2,
    )
    assert result.returncode == 0, result.stderr
    written = target.read_text().splitlines(keepends=True)
    lines = list(csv.DictReader(written)) if out == ".csv" else [json.loads(line) for line in written]
    expected = [specialist.generate_summary(note, 15)["generated_summary"] for note in notes]
    assert [(line["id"], line["generated_summary"].removeprefix("'")) for line in lines[:4]] == list(
        zip(ids, expected)
    )
    failed = len(lines) - 4
    assert f"4 done, 0 of them shortened, {failed} failed" in result.stderr and failed == (kind != ".txt")
    assert not list(tmp_path.glob("*.partial")) and target.stat().st_mode & 0o077 == 0


def test_spreadsheet_formulas_are_defused():
    assert [defuse(cell) for cell in ("=1+1", "+1", "-1", "@x", "fine", "")] == [
        "'=1+1",
        "'+1",
        "'-1",
        "'@x",
        "fine",
        "",
    ]


def test_bad_rows_of_input_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"clinical_note": "ok"}\n{"text": 1}\n')
    with pytest.raises(InputError, match="line 2"):
        list(read_notes(tmp_path / "a.jsonl"))
    write_csv(tmp_path / "a.csv", [(1,)], header=["text"])
    with pytest.raises(InputError, match="clinical_note"):
        list(read_notes(tmp_path / "a.csv"))


# ------------------------------------------------------------------------------------------------ going on


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
    assert [(row_id, note.strip()) for row_id, note in read_notes(tmp_path / "a.txt")] == [
        ("1", "Fever."),
        ("3", "Cough."),
    ]


def test_ids_that_utf_8_cannot_hold_are_mended(tmp_path):
    ids = ["a\ud83d", " b\x00 ", "", 7, None, "\ud83d\ude00"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"id": i, "clinical_note": "x"}) + "\n" for i in ids)
    )
    source = list(read_notes(tmp_path / "a.jsonl"))
    assert [row_id for row_id, _ in source] == ["a\ufffd", "b", "3", "7", "5", "\U0001f600"]
    summarize_file(source, options(tmp_path / "out.jsonl"), {}, made_up)
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        row_id for row_id, _ in source
    ]


def options(target, resume=False, batch_size=1):
    return SimpleNamespace(output_file=str(target), resume=resume, batch_size=batch_size, json=False)


def made_up(part, first, on_done, on_token):
    """A result that depends on the note, its number and the window it came in."""
    results = []
    for i, note in enumerate(part, first):
        on_done()
        text = {
            "generated_summary": f"{note!r} is {i} of {first}",
            "warnings": ["note shortened: x"] if i % 5 == 0 else [],
        }
        results.append({"generated_summary": "", "error": "empty"} if note == "" else text)
    return results


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_a_file_interrupted_anywhere_ends_as_if_it_had_not_been(tmp_path, kind, capsys):
    notes = [(f"n{i}", f'=note,\n"{i}" ü' if i % 7 else "") for i in range(61)]
    whole, belongs_to = tmp_path / f"whole{kind}", {"adapter": "a"}
    summarize_file(notes, options(whole), belongs_to, made_up)
    assert "52 done, 11 of them shortened, 9 failed" in capsys.readouterr().err
    source, target = random.Random(0), tmp_path / f"out{kind}"
    partial = tmp_path / f"out{kind}.partial"
    interruptions = 0
    while not target.exists():
        left = source.randrange(1, 40)

        def interrupted(part, first, on_done, on_token):
            nonlocal left
            left -= len(part)
            if left < 0:
                raise KeyboardInterrupt
            return made_up(part, first, on_done, on_token)

        try:
            summarize_file(notes, options(target, resume=True), belongs_to, interrupted)
        except KeyboardInterrupt:
            interruptions += 1
            with open(
                partial, "ab"
            ) as file:  # as a kill leaves it: rows that no record counts, the last one torn
                file.write(whole.read_bytes()[: source.randrange(50)])
    assert interruptions > 1 and target.read_bytes() == whole.read_bytes()
    assert "52 done, 11 of them shortened, 9 failed" in capsys.readouterr().err
    records = [f".out{kind}.done.json", f".whole{kind}.done.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*records, f"out{kind}", f"whole{kind}"]
    assert target.stat().st_mode & 0o077 == 0


def test_partial_files_of_other_runs_are_refused(tmp_path):
    notes, target = [(str(i), "x") for i in range(30)], tmp_path / "out.jsonl"

    def begin():
        with pytest.raises(KeyboardInterrupt):
            summarize_file(notes, options(target, resume=True), {"adapter": "a", "seed": 1}, fail_later)

    def fail_later(part, first, on_done, on_token):
        if first:
            raise KeyboardInterrupt
        return made_up(part, first, on_done, on_token)

    begin()
    record = tmp_path / "out.jsonl.partial.json"
    with pytest.raises(InputError, match="--resume"):
        summarize_file(notes, options(target), {"adapter": "a", "seed": 1}, made_up)
    with pytest.raises(InputError, match="another adapter, seed"):
        summarize_file(notes, options(target, resume=True), {"adapter": "b", "seed": 2}, made_up)
    with pytest.raises(InputError, match="another part of the notes"):
        summarize_file(notes[:-1], options(target, resume=True), {"adapter": "a", "seed": 1}, made_up)
    assert "x" not in record.read_text().replace("max", "")  # no text of a note
    (tmp_path / "out.jsonl.partial").write_text("short")
    with pytest.raises(InputError, match="shorter"):
        summarize_file(notes, options(target, resume=True), {"adapter": "a", "seed": 1}, made_up)
    whole = json.loads(record.read_text())
    for damaged in (
        "{",
        "[]",
        *(
            json.dumps({**whole, **bad})
            for bad in ({"belongs_to": []}, {"bytes": -5}, {"done": "3"}, {"counts": {}})
        ),
    ):
        record.write_text(damaged)
        with pytest.raises(InputError, match="damaged"):
            summarize_file(notes, options(target, resume=True), {"adapter": "a", "seed": 1}, made_up)
    record.unlink()
    with pytest.raises(InputError, match="no record"):
        summarize_file(notes, options(target, resume=True), {"adapter": "a", "seed": 1}, made_up)
    assert (tmp_path / "out.jsonl.partial").read_text() == "short"


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_a_partial_file_killed_before_its_first_record(tmp_path, kind):
    target, partial = tmp_path / f"out{kind}", tmp_path / f"out{kind}.partial"
    for begun in ("", "id,generated_summary,conf"[: 25 if kind == ".csv" else 0]):
        partial.write_text(begun)
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
    with pytest.raises(InputError, match=r"partial-1-of-2 is there: an earlier run had another number"):
        check_output(str(target), False, dict)
    (tmp_path / strangers[-1]).unlink()
    summarize_file(notes, options(target), {"seed": 1}, made_up)
    assert check_output(str(target), True, lambda: {"seed": 1})
    assert all((tmp_path / name).read_text() == "{}" for name in strangers[:-1])

    link, elsewhere = tmp_path / "b.jsonl.partial", tmp_path / "elsewhere"
    link.symlink_to(elsewhere)
    for content in (None, "precious"):
        elsewhere.write_text(content) if content else None
        with pytest.raises(InputError, match="symbolic link"):
            summarize_file(notes, options(tmp_path / "b.jsonl", resume=True), {}, made_up)
    assert elsewhere.read_text() == "precious"

    def slowly(*arguments):
        (tmp_path / "c.jsonl").write_text("precious")
        return made_up(*arguments)

    with pytest.raises(InputError, match="has appeared"):
        summarize_file(notes, options(tmp_path / "c.jsonl"), {}, slowly)
    assert (tmp_path / "c.jsonl").read_text() == "precious"
    (tmp_path / "c.jsonl").unlink()
    summarize_file(
        notes, options(tmp_path / "c.jsonl", resume=True), {}, slowly
    )  # nothing is left to be written
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 1


def test_two_processes_cannot_write_one_file(tmp_path):
    target, refused = tmp_path / "out.jsonl", []

    def meanwhile(*arguments):
        with pytest.raises(InputError, match="another process is writing"):
            summarize_file([("1", "x")], options(target, resume=True), {}, made_up)
        refused.append(1)
        return made_up(*arguments)

    summarize_file([("1", "x")], options(target), {}, meanwhile)
    assert refused and len(target.read_text().splitlines()) == 1


def test_a_name_with_no_room_for_its_partial_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="too long"):
        check_output(str(tmp_path / ("a" * 240 + ".jsonl")), False, dict)


def test_a_complete_file_of_another_run_is_refused(tmp_path):
    target, left = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    summarize_file([("1", "x")], options(target), {"adapter": "a", "seed": 1}, made_up)
    left.write_text("left by a kill after the join")
    (tmp_path / "out.jsonl.partial.json").write_text(
        json.dumps(
            {
                "belongs_to": {"adapter": "a", "seed": 1, "part of the notes": [0, 1]},
                "done": 1,
                "bytes": 9,
                "counts": dict.fromkeys(("done", "shortened", "failed"), 0),
            }
        )
    )
    with pytest.raises(InputError, match="another seed"):
        check_output(str(target), True, lambda: {"adapter": "a", "seed": 2})
    assert left.exists()
    assert check_output(str(target), True, lambda: {"adapter": "a", "seed": 1}) and not left.exists()
    with pytest.raises(InputError, match="exists"):
        check_output(str(target), False, lambda: {"adapter": "a", "seed": 1})
    for record in ("{", "5", None):
        (tmp_path / ".out.jsonl.done.json").unlink() if record is None else (
            tmp_path / ".out.jsonl.done.json"
        ).write_text(record)
        with pytest.raises(InputError, match="no record"):
            check_output(str(target), True, lambda: {"adapter": "a", "seed": 1})
    target.unlink()
    assert not check_output(str(target), True, dict)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_the_next_token(tmp_path, number, capsys):
    target = tmp_path / "out.jsonl"

    def signalled(part, first, on_done, on_token):
        if first:
            os.kill(os.getpid(), number)
            on_token(None)
            raise AssertionError("went on")
        return made_up(part, first, on_done, on_token)

    with pytest.raises(
        Stopped, match="holds 8 of 20 notes; the same command with --resume goes on"
    ) as stopped:
        summarize_file([(str(i), "x") for i in range(20)], options(target), {}, signalled)
    assert (
        stopped.value.signal == number and "--resume" not in capsys.readouterr().err
    )  # said once, by the script
    summarize_file([(str(i), "x") for i in range(20)], options(target, resume=True), {}, made_up)
    assert len(target.read_text().splitlines()) == 20


def test_nothing_is_begun_where_no_note_fits(adapters, tmp_path):
    source, target = many_notes(tmp_path / "notes.csv", 2), tmp_path / "out.jsonl"
    arguments = ["--model_path", adapters(), "--input_file", source, "--output_file", target]
    assert_input_error(run_inference(*arguments, "--max_new_tokens", 9000), "leaves no room")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.csv"]


def many_notes(path, n=60):
    source = random.Random(0)
    return write_csv(
        path,
        [
            (i, " ".join(source.choices([note for note, _ in NOTES], k=source.randrange(1, 6))))
            for i in range(n)
        ],
        header=["id", "clinical_note"],
    )


def run_cli(arguments, stderr, environment):
    """sft_inference.py in a process that has its imports already."""
    os.environ.update(environment)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.argv = ["sft_inference.py", "--device", "cpu", *arguments]
    run_script(sft_inference.main)


@pytest.fixture
def start(tmp_path):
    """start(*arguments, **environment): (process, file of its standard error). They are forked off a server that only imports:
    starting Python and torch is what costs time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sft_inference", "sft.inference.decoding", "sft.model.adapter", "peft"])

    def make(*arguments, **environment):
        stderr = tmp_path / f"stderr-{time.monotonic_ns()}"
        process = context.Process(
            target=run_cli, args=([str(argument) for argument in arguments], stderr, environment)
        )
        process.start()
        return process, stderr

    return make


def finished(process, stderr):
    process.join(120)
    return process.exitcode, stderr.read_text()


def test_kills_and_terminations(adapters, tmp_path, start):
    """SIGKILL and SIGTERM while the file is being written. Drawn summaries, since greedy ones would hide a mistake in the
    seeds."""
    source, whole, target = (
        many_notes(tmp_path / "notes.csv"),
        tmp_path / "whole.jsonl",
        tmp_path / "out.jsonl",
    )
    arguments = [
        "--model_path",
        adapters(),
        "--input_file",
        source,
        "--max_new_tokens",
        20,
        "--batch_size",
        1,
        "--temperature",
        0.7,
    ]
    status, said = finished(*start(*arguments, "--output_file", whole))
    assert status == 0 and "60 done" in said, said
    partial, sizes = tmp_path / "out.jsonl.partial", []
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = partial.stat().st_size if partial.exists() else 0
        process, stderr = start(*arguments, "--output_file", target, "--resume")
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size > before):
            assert process.is_alive() and time.monotonic() < deadline, stderr.read_text()
            time.sleep(0.01)
        os.kill(process.pid, number)
        status, said = finished(process, stderr)
        sizes.append(partial.stat().st_size)
        assert not target.exists() and status == (-9 if number == signal.SIGKILL else 143)
    assert (
        said.count("--resume goes on") == 1
        and NOTES[0][0] not in said
        and "Traceback" not in said
        and 0 < sizes[0] < sizes[1]
    )
    status, said = finished(*start(*arguments, "--output_file", target))
    assert status == 2 and "--resume" in said
    status, said = finished(*start(*arguments, "--output_file", target, "--resume"))
    assert status == 0 and "Going on after" in said and "60 done" in said, said
    assert target.read_bytes() == whole.read_bytes()
    status, said = finished(*start(*arguments, "--output_file", target, "--resume"))
    assert status == 0 and "complete" in said
    status, said = finished(*start(*arguments, "--output_file", target, "--resume", "--seed", 1))
    assert status == 2 and "another seed" in said


def test_several_processes(adapters, specialist, tmp_path):
    source, target = many_notes(tmp_path / "notes.csv", 7), tmp_path / "out.csv"
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        "sft_inference.py",
        "--device",
        "cpu",
    )
    options = ["--max_new_tokens", 8, "--batch_size", 1, "--temperature", 0.7]
    result = run_python(
        *torchrun, "--model_path", adapters(), "--input_file", source, "--output_file", target, *options
    )
    assert result.returncode == 0 and result.stderr.count("7 done") == 1, result.stderr
    with open(target, newline="") as file:
        written = [(row["id"], row["generated_summary"].removeprefix("'")) for row in csv.DictReader(file)]
    ids, notes = zip(*read_notes(source))
    assert written == list(
        zip(ids, (one["generated_summary"] for one in specialist.generate_batch(notes, 8, 0.7, batch_size=1)))
    )
    assert not list(tmp_path.glob("*.partial*"))


def test_one_note_without_memory_does_not_fail_the_others(specialist, monkeypatch):
    notes = [note for note, _ in NOTES[:6]]
    expected, decode = specialist.generate_batch(notes, 5), specialist.decode
    longest = max(range(6), key=lambda i: len(specialist._prompt(notes[i], 5)[0]))

    def forgetful(prompts, *arguments, batch_size, **options):
        if longest in prompts or batch_size > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        yield from decode(prompts, *arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(specialist, "decode", forgetful)
    results = specialist.generate_batch(notes, 5)
    assert results[longest]["error"] == "too little memory for this note"
    assert [r for i, r in enumerate(results) if i != longest] == [
        r for i, r in enumerate(expected) if i != longest
    ]


def test_a_dead_gpu_stops_the_run(specialist, monkeypatch):
    def dead(*arguments, **options):
        raise torch.AcceleratorError(
            "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"
        )
        yield

    monkeypatch.setattr(specialist, "decode", dead)
    with pytest.raises(
        RunError, match=r"the model failed \(AcceleratorError: CUDA error: device-side assert triggered\)"
    ):
        specialist.generate_batch([note for note, _ in NOTES], 5)


def test_what_is_want_of_memory():
    with pytest.raises(RuntimeError) as no_room:
        torch.empty(1 << 55)
    with pytest.raises(OSError) as no_map:
        mmap.mmap(-1, 1 << 60)
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert all(is_out_of_memory(error) for error in (no_room.value, no_map.value, cuda, MemoryError()))
    assert not any(
        is_out_of_memory(error)
        for error in (RuntimeError("CUDA error: an illegal memory access was encountered"), OSError(5, "x"))
    )
