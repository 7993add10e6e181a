"""Files of notes: formats, windows, going on after a kill, several processes."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import NOTES, ROOT, assert_mendable, run_inference, write_csv

from sft_common import InputError
from sft_note_files import defuse, read_notes, summarize_file


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
            source.write_text("".join(json.dumps({"id": i, "clinical_note": n}) + "\n" for i, n in [*zip(ids, notes), ("e", "")]))
    result = run_inference(
        "--model_path", adapters(), "--input_file", source, "--output_file", target, "--max_new_tokens", 15, "--batch_size", 2
    )
    assert result.returncode == 0, result.stderr
    written = target.read_text().splitlines(keepends=True)
    lines = list(csv.DictReader(written)) if out == ".csv" else [json.loads(line) for line in written]
    expected = [specialist.generate_summary(note, 15)["generated_summary"] for note in notes]
    assert [(line["id"], line["generated_summary"].removeprefix("'")) for line in lines[:4]] == list(zip(ids, expected))
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


def options(target, resume=False, batch_size=1):
    return SimpleNamespace(output_file=str(target), resume=resume, batch_size=batch_size, json=False)


def made_up(part, first, tick):
    """A result that depends on the note, its number and the window it came in."""
    results = []
    for i, note in enumerate(part, first):
        tick()
        text = {"generated_summary": f"{note!r} is {i} of {first}", "warnings": ["note shortened: x"] if i % 5 == 0 else []}
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

        def interrupted(part, first, tick):
            nonlocal left
            left -= len(part)
            if left < 0:
                raise KeyboardInterrupt
            return made_up(part, first, tick)

        try:
            summarize_file(notes, options(target, resume=True), belongs_to, interrupted)
        except KeyboardInterrupt:
            interruptions += 1
            with open(partial, "ab") as file:  # as a kill leaves it: rows that no record counts, the last one torn
                file.write(whole.read_bytes()[: source.randrange(50)])
    assert interruptions > 1 and target.read_bytes() == whole.read_bytes()
    assert "52 done, 11 of them shortened, 9 failed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out{kind}", f"whole{kind}"]
    assert target.stat().st_mode & 0o077 == 0


def test_partial_files_of_other_runs_are_refused(tmp_path):
    notes, target = [(str(i), "x") for i in range(30)], tmp_path / "out.jsonl"

    def begin():
        with pytest.raises(KeyboardInterrupt):
            summarize_file(notes, options(target, resume=True), {"adapter": "a", "seed": 1}, fail_later)

    def fail_later(part, first, tick):
        if first:
            raise KeyboardInterrupt
        return made_up(part, first, tick)

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
    record.write_text("{")
    with pytest.raises(InputError, match="damaged"):
        summarize_file(notes, options(target, resume=True), {"adapter": "a", "seed": 1}, made_up)
    record.unlink()
    begin()  # a partial file without a record holds nothing that counts
    summarize_file(notes, options(target, resume=True), {"adapter": "a", "seed": 1}, made_up)
    assert len(target.read_text().splitlines()) == 30


def many_notes(path, n=60):
    source = random.Random(0)
    return write_csv(
        path,
        [(i, " ".join(source.choices([note for note, _ in NOTES], k=source.randrange(1, 6)))) for i in range(n)],
        header=["id", "clinical_note"],
    )


def inference_process(*arguments, launcher=()):
    words = [sys.executable, *launcher, "sft_inference.py", "--device", "cpu", *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def test_kills_terminations_and_processes(adapters, tmp_path):
    """SIGKILL and SIGTERM while the file is being written; then the same in two processes through torchrun. Drawn
    summaries, since greedy ones would hide a mistake in the seeds."""
    source, whole, target = many_notes(tmp_path / "notes.csv"), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    arguments = ["--model_path", adapters(), "--input_file", source, "--max_new_tokens", 30, "--batch_size", 1, "--temperature", 0.7]
    undisturbed = run_inference(*arguments, "--output_file", whole)
    assert undisturbed.returncode == 0 and "60 done" in undisturbed.stderr, undisturbed.stderr
    partial, sizes = tmp_path / "out.jsonl.partial", []
    for kill in (signal.SIGKILL, signal.SIGTERM):
        before = partial.stat().st_size if partial.exists() else 0
        process = inference_process(*arguments, "--output_file", target, "--resume")
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size > before):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(kill)
        said = process.communicate()[1]
        sizes.append(partial.stat().st_size)
        assert not target.exists() and process.returncode == (-9 if kill == signal.SIGKILL else 130)
    assert "--resume goes on" in said and NOTES[0][0] not in said and 0 < sizes[0] < sizes[1]
    assert_mendable(run_inference(*arguments, "--output_file", target), "--resume")
    finished = run_inference(*arguments, "--output_file", target, "--resume")
    assert finished.returncode == 0 and "Going on after" in finished.stderr and "60 done" in finished.stderr
    assert target.read_bytes() == whole.read_bytes()
    again = run_inference(*arguments, "--output_file", target, "--resume")
    assert again.returncode == 0 and "complete" in again.stderr

    shared = tmp_path / "shared.csv"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = inference_process(*arguments, "--output_file", shared, launcher=torchrun)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and said.count("60 done") == 1, said
    with open(shared, newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(row["id"], row["generated_summary"].removeprefix("'")) for row in rows] == [
        (e["id"], e["generated_summary"]) for e in expected
    ]
    assert not list(tmp_path.glob("*.partial*"))


def test_one_note_without_memory_does_not_fail_the_others(specialist, monkeypatch):
    notes = [note for note, _ in NOTES[:6]]
    expected, decode = specialist.generate_batch(notes, 5), specialist.decode
    longest = max(range(6), key=lambda i: len(specialist._prompt(notes[i], 5)[0]))

    def forgetful(prompts, *arguments, batch_size, **options):
        if longest in prompts or batch_size > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        yield from decode(prompts, *arguments, batch_size=batch_size, **options)

    monkeypatch.setattr(specialist, "decode", forgetful)
    results = specialist.generate_batch(notes, 5)
    assert results[longest]["error"] == "too little memory for this note"
    assert [r for i, r in enumerate(results) if i != longest] == [r for i, r in enumerate(expected) if i != longest]
