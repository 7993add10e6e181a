"""Files of notes: formats, windows, resuming after an interruption."""

import csv
import errno
import json
import os
import random
import signal
import sys

import pytest
from tiny import NOTES, write_csv

import sft_inference
from sft.cli import InputError, RunError, Stopped
from sft.inference.note_files import check_output, report, summarize_file
from sft.inference.notes import Note, read_notes
from sft.inference.results import failure
from sft.options import InferenceConfig


@pytest.mark.parametrize("kind, out", [(".txt", ".jsonl"), (".csv", ".csv"), (".jsonl", ".csv")])
def test_files_in_and_out(adapters, specialist, tmp_path, monkeypatch, capsys, kind, out):
    source = tmp_path / f"notes{kind}"
    target = tmp_path / f"summaries{out}"
    notes = [note.replace("\n", " ") for note, _ in NOTES[:4]]
    if kind == ".txt":
        source.write_text("\n\n".join(notes))
        ids = [None] * 4
    else:
        notes[1] = 'Two\nlines, "quoted".'
        ids = ["a", "b", "c", "d"]
        rows = [*zip(ids, notes), ("e", " ")]
        if kind == ".csv":
            write_csv(source, rows, header=["id", "clinical_note"])
        else:
            source.write_text("".join(json.dumps({"id": i, "clinical_note": n}) + "\n" for i, n in rows))
    arguments = f"--device cpu --model_path {adapters()} --max_new_tokens 15 --batch_size 2".split()
    arguments += ["--input_file", str(source), "--output_file", str(target)]
    monkeypatch.setattr(sys, "argv", ["sft_inference.py", *arguments])
    sft_inference.main()
    err = capsys.readouterr().err
    written = target.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    assert target.read_bytes().startswith(b"\xef\xbb\xbf") == (out == ".csv")
    lines = list(csv.DictReader(written)) if out == ".csv" else [json.loads(line) for line in written]
    expected = [specialist.generate_summary(note, 15)["generated_summary"] for note in notes]
    summaries = [(line["id"] or None, line["generated_summary"].removeprefix("'")) for line in lines[:4]]
    assert summaries == list(zip(ids, expected))
    rows = {".txt": [1, 3, 5, 7], ".csv": [2, 3, 4, 5], ".jsonl": [1, 2, 3, 4]}[kind]
    assert [int(line["row"]) for line in lines[:4]] == rows
    assert {frozenset(line.keys() - {"error"}) for line in lines} == {frozenset(lines[0].keys() - {"error"})}
    n_failed = 0 if kind == ".txt" else 1
    assert len(lines) == 4 + n_failed
    assert f"4 notes summarized (0 of the notes shortened), {n_failed} failed" in err
    assert f"notes/s; written to {target}" in err
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("separator, kind", [(";", ".csv"), ("\t", ".csv"), ("\t", ".tsv"), ("|", ".csv")])
def test_a_csv_has_the_separator_of_its_notes(adapters, tmp_path, monkeypatch, separator, kind):
    """Also one that was interrupted; cells that hold the separator stay whole."""
    source = tmp_path / f"notes{kind}"
    with open(source, "w", newline="") as file:
        rows = [["id", "text", "a;b"], ["n1", "Fever, cough; 5|6\tof seven.", "x;y"], ["n2", "Cough.", "5,5"]]
        csv.writer(file, delimiter=separator).writerows(rows)
    arguments = f"--device cpu --writing quote --note_column text --model_path {adapters()}".split()

    def run(name, *more):
        values = ["--input_file", source, "--keep_columns", "a;b", "--output_file", tmp_path / name, *more]
        monkeypatch.setattr(sys, "argv", ["sft_inference.py", *arguments, *map(str, values)])
        sft_inference.main()
        return (tmp_path / name).read_bytes()

    whole = run("whole.csv")
    written = list(csv.DictReader(whole.decode("utf-8-sig").splitlines(), delimiter=separator))
    assert [(row["id"], row["a;b"]) for row in written] == [("n1", "x;y"), ("n2", "5,5")]
    assert written[0]["generated_summary"] == rows[1][1].replace("\t", " ")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("sft.inference.note_files.format_result", raise_interrupt)
        run("again.csv")
    assert run("again.csv", "--resume") == whole


def raise_interrupt(*_, **__):
    raise KeyboardInterrupt


def made_notes(*texts):
    return [Note(i, f"n{i}", text) for i, text in enumerate(texts)]


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
    source = read_notes(tmp_path / "a.jsonl")
    repaired = ["a\ufffd", "b", None, "7", None, "\U0001f600"]
    assert [note.id for note in source] == repaired
    summarize_file(source, options(tmp_path / "out.jsonl"), {}, made_up)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in written] == repaired
    assert [line["row"] for line in written] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("json_lines", [False, True])
def test_standard_output(capsys, json_lines):
    config = InferenceConfig(batch_size=1, json=json_lines)
    summarize_file([Note(1, "a", "x"), Note(2, None, "")], config, {}, made_up)
    out, err = capsys.readouterr()
    if json_lines:
        assert [json.loads(line)["id"] for line in out.splitlines()] == ["a", None]
    else:
        assert out == "[a] 'x' is 0 of 0\n\n[row 2] empty\n\n"
    assert "1 note summarized (1 of the notes shortened), 1 failed; " in err


def test_failures_and_warnings_are_summed_up(tmp_path, capsys):
    def warned(window, should_stop):
        for number in window:
            cut = f"summary cut after {number + 5} tokens: raise max_new_tokens"
            yield (
                number,
                {"generated_summary": "x", "warnings": [cut] * 2} if number else failure("the note is empty"),
            )

    config = InferenceConfig(output_file=str(tmp_path / "a.csv"), keep_columns=["=ward"])
    notes = [Note(i, str(i), "x", {"=ward": ["-7", None, {"a": "ü"}][i]}) for i in range(3)]
    summarize_file(notes, config, {}, warned)
    err = capsys.readouterr().err
    assert "warning: 2 notes: summary cut after N tokens\n" in err
    assert "warning: 1 note: the note is empty\n" in err
    with open(tmp_path / "a.csv", newline="", encoding="utf-8-sig") as file:
        assert [row["'=ward"] for row in csv.DictReader(file)] == ["-7", "", '{"a": "ü"}']
    config = InferenceConfig(output_file=str(tmp_path / "b.jsonl"), fail_on_error=True)
    with pytest.raises(RunError, match="1 note failed"):
        summarize_file(notes, config, {}, warned)
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 3
    # Also where the complete file is found again
    config.resume = True
    counts = check_output(config, dict)
    with pytest.raises(RunError, match="1 note failed"):
        report(counts, "", config)
    with pytest.raises(RunError, match="all 1 note failed"):
        summarize_file(notes[:1], options(tmp_path / "c.jsonl"), {}, warned)


def test_standard_output_is_in_order_and_keeps_what_is_finished(capsys):
    def interrupted(window, should_stop):
        for number in (0, 2, 1, 4):
            yield number, {"generated_summary": str(number)}
            seen.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        summarize_file([Note(i, None, "x") for i in range(6)], InferenceConfig(batch_size=6), {}, interrupted)
    assert seen == ["[row 0] 0\n\n", "", "[row 1] 1\n\n[row 2] 2\n\n", ""]
    out, err = capsys.readouterr()
    assert out == "[row 4] 4\n\n"
    assert "stopped: 4 of 6 notes summarized" in err


def test_a_second_signal_stops_a_stuck_run(tmp_path, capsys):
    def stuck(window, should_stop):
        yield 0, {"generated_summary": "x"}
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    with pytest.raises(KeyboardInterrupt):
        summarize_file(made_notes("x", "y"), options(tmp_path / "a.jsonl"), {}, stuck)
    assert "partial holds 1 of 2 notes" in capsys.readouterr().err


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    notes = made_notes("x", "y", "z")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("sft.inference.note_files.csv_row", full)
        with pytest.raises(OSError, match="No space"):
            summarize_file(notes, options(tmp_path / "a.csv"), {}, made_up)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv.partial"]
    summarize_file(
        notes, options(tmp_path / "a.csv", resume=True), {}, lambda *_, **__: pytest.fail("computed")
    )
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 4


# ------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_a_file_interrupted_anywhere_ends_as_if_it_had_not_been(tmp_path, kind, capsys):
    notes = [Note(i, f"n{i}", f'=note,\n"{i}" ü' if i % 7 else "") for i in range(61)]
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


@pytest.mark.parametrize(
    "content", ['{"id": "1", "generated_summary": "x"}\n', "id,generated_summary\n", "short"]
)
def test_what_is_no_partial_file_is_refused(tmp_path, content):
    target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    partial.write_text(content)
    with pytest.raises(InputError, match="cannot be matched to it"):
        summarize_file(made_notes("x"), options(target), {}, made_up)
    assert partial.read_text() == content
    # All that a run leaves that was killed before its first line
    for content in ("", '{"fingerprint": {"part of'):
        partial.write_text(content)
        summarize_file(made_notes("x"), options(target), {}, made_up)
        assert target.stat().st_mode & 0o077 == 0
        target.unlink()


def test_names_that_are_no_output_file(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    names = {"link": "is a symbolic link", "folder": "exists", "a" * 240: "too long"}
    for name, words in names.items():
        for resume in (False, True):
            with pytest.raises(InputError, match=words):
                check_output(options(tmp_path / f"{name}.jsonl", resume), dict)


def test_partial_files_of_other_runs_are_refused(tmp_path):
    notes = made_notes(*"x" * 30)
    target = tmp_path / "out.jsonl"
    ours = {"adapter": "a", "seed": 1}
    with pytest.raises(KeyboardInterrupt):
        summarize_file(notes, options(target), ours, interrupted_later)
    with pytest.raises(InputError, match="--resume"):
        check_output(options(target), dict)
    for part, other, words in (
        (notes, {"adapter": "b", "seed": 2}, "adapter, seed"),
        (notes[:-1], ours, "part of the notes"),
    ):
        with pytest.raises(InputError, match=f"different {words}"):
            summarize_file(part, options(target), other, made_up)
    assert "x" not in (tmp_path / "out.jsonl.partial").read_text().splitlines()[0]  # no text of a note


def test_finished_summaries_survive_an_interruption(tmp_path, capsys):
    """In any order in their window; they are in the partial file at once, and never computed into another
    place."""
    notes = [Note(i, None, "x") for i in range(30)]
    target = tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"

    def interrupted(window, should_stop):
        for number, result in made_up(window, should_stop):
            if number == 10:
                assert partial.read_text().count("\n") == 1 + 8 + 5
                raise KeyboardInterrupt
            yield number, result

    with pytest.raises(KeyboardInterrupt):
        summarize_file(notes, options(target), {}, interrupted)
    assert "partial holds 13 of 30 notes; run the same command with --resume" in capsys.readouterr().err
    computed = []

    def noted(window, should_stop):
        computed.extend(window)
        return made_up(window, should_stop)

    # Windows are computed again whole
    summarize_file(notes, InferenceConfig(output_file=str(target), resume=True, batch_size=3), {}, noted)
    assert computed == list(range(30))
    assert "Resuming after 13 of 30 notes" in capsys.readouterr().err
    assert [json.loads(line)["row"] for line in target.read_text().splitlines()] == list(range(30))


def risky(window, should_stop):
    """The first and the third are risky, the fourth is not English, the fifth fails."""
    for number in window:
        risk = None if number == 3 else 2.5 * (number % 2 == 0)
        kinds = {"side": 2, "number": 1} if number == 0 else {}
        result = {"generated_summary": f"{number}", "check_risk": risk, "n_findings": kinds, "warnings": []}
        yield number, failure("the note is empty") if number == 4 else result


@pytest.mark.parametrize("kind", [".jsonl", ".csv"])
def test_risky_summaries_are_put_aside(tmp_path, capsys, kind):
    notes = made_notes(*"abcdef")
    target, review = tmp_path / f"out{kind}", tmp_path / f"review{kind}"

    def summarize_notes(resume=False):
        config = InferenceConfig(
            output_file=str(target), max_risk=2.4, review_file=str(review), resume=resume, batch_size=1
        )
        check_output(config, dict)
        summarize_file(notes, config, {}, risky)

    def ids(path):
        if kind == ".csv":
            return "".join(row["id"][1:] for row in csv.DictReader(path.open(encoding="utf-8-sig")))
        return "".join(json.loads(line)["id"][1:] for line in path.read_text().splitlines())

    summarize_notes()
    assert (ids(target), ids(review)) == ("145", "023")
    err = capsys.readouterr().err
    assert "3 of the summaries, with a check_risk above 2.4, or not checked, are in" in err
    assert "The check flagged 1 of 5 summaries (20%)" in err
    assert "1 note: the check found: side" in err
    with pytest.raises(InputError, match="exists"):
        summarize_notes()
    # Killed between the two files: the review file stays if it is this run's
    written = review.read_bytes()
    target.unlink()
    (tmp_path / f"{target.name}.partial").write_text("")
    summarize_notes(resume=True)
    assert (ids(target), review.read_bytes()) == ("145", written)
    target.unlink()
    review.write_text("precious")
    (tmp_path / f"{target.name}.partial").write_text("")
    with pytest.raises(InputError, match="has appeared"):
        summarize_notes(resume=True)
    assert review.read_text() == "precious"
    assert not target.exists()


def test_only_files_of_its_own_are_touched(tmp_path):
    """Other people's files whose names are like ours, files that appear meanwhile, symbolic links."""
    target, notes = tmp_path / "s[12].jsonl", [Note(1, "1", "x")]
    strangers = [
        f"{target.name}.partial-notes.txt",
        "s1.jsonl.partial",
        f"{target.name}.partial-1-of-2",
    ]
    for name in strangers:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"partial-1-of-2 exists: the earlier run used a different number"):
        check_output(options(target), dict)
    (tmp_path / strangers[-1]).unlink()
    summarize_file(notes, options(target), {"seed": 1}, made_up)
    assert check_output(options(target, True), lambda: {"seed": 1})["done"] == 1
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
            summarize_file([Note(1, "1", "x")], options(target, resume=True), {}, made_up)
        refused.append(1)
        return made_up(window, should_stop)

    summarize_file([Note(1, "1", "x")], options(target), {}, meanwhile)
    assert refused
    assert len(target.read_text().splitlines()) == 1


def test_a_complete_file_of_another_run_is_refused(tmp_path):
    target = tmp_path / "out.jsonl"
    left = tmp_path / "out.jsonl.partial"
    summarize_file([Note(1, "1", "x")], options(target), {"adapter": "a", "seed": 1}, made_up)
    record = {"fingerprint": {"adapter": "a", "seed": 1, "part of the notes": [0, 1]}}
    left.write_text(json.dumps(record) + "\n")
    with pytest.raises(InputError, match="different seed"):
        check_output(options(target, True), lambda: {"adapter": "a", "seed": 2})
    assert left.exists()
    assert check_output(options(target, True), lambda: {"adapter": "a", "seed": 1})
    assert not left.exists()
    with pytest.raises(InputError, match="exists"):
        check_output(options(target), lambda: {"adapter": "a", "seed": 1})
    for record in ("{", "5", None):
        if record is None:
            (tmp_path / ".out.jsonl.done.json").unlink()
        else:
            (tmp_path / ".out.jsonl.done.json").write_text(record)
        with pytest.raises(InputError, match=r"its record .* is missing or unreadable"):
            check_output(options(target, True), lambda: {"adapter": "a", "seed": 1})
    target.unlink()
    assert check_output(options(target, True), dict) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_at_the_next_token(tmp_path, number, capsys):
    notes = [Note(i, str(i), "x") for i in range(20)]
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
