"""Files of notes in processes of their own: kills, several processes at the same time."""

import csv
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
from conftest import run_python
from tiny import NOTES, write_csv

import sft_inference
from sft.cli import InputError, run_script
from sft.inference.notes import read_notes


def test_no_file_is_created_if_no_note_fits(adapters, tmp_path, monkeypatch):
    source = many_notes(tmp_path / "notes.csv", 2)
    options = f"--device cpu --model_path {adapters()} --max_new_tokens 9000 --input_file {source}".split()
    monkeypatch.setattr(sys, "argv", ["sft_inference.py", *options, "--output_file", f"{tmp_path}/out.jsonl"])
    with pytest.raises(InputError, match="leaves no room"):
        sft_inference.main()
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
    with open(target, newline="", encoding="utf-8-sig") as file:
        written = [(row["id"], row["generated_summary"].removeprefix("'")) for row in csv.DictReader(file)]
    ids, notes = zip(*((note.id, note.text) for note in read_notes(source)))
    expected = specialist.generate_batch(notes, 8, 0.7, batch_size=1)
    assert written == list(zip(ids, (result["generated_summary"] for result in expected)))
    assert not list(tmp_path.glob("*.partial*"))
