"""Errors and exit codes, standard streams, signals, progress, words."""

import errno
import io
import mmap
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_input_error, run_python

from sft.cli import (
    InputError,
    Progress,
    RunError,
    as_input_error,
    check_processes,
    is_disk_full,
    is_out_of_memory,
    noted_signals,
    on_main_process,
    plural,
    preview_list,
    processes,
    run_script,
    safe_id,
)

# ------------------------------------------------------------------------------- exit codes and streams


@pytest.mark.parametrize(
    "code, environment, status, stdout, stderr",
    [
        ("print('38\u00b0')", {"PYTHONIOENCODING": "ascii"}, 0, "38\\xb0\n", ""),
        ("print(len(input()))", {"PYTHONIOENCODING": "utf-8:strict"}, 0, "5\n", ""),
        ("raise InputError('bad', 'do this')", {}, 2, "", "error: bad\nfix:   do this\n"),
        ("raise RunError('failed')", {}, 1, "", "error: failed\n"),
        ("raise Stopped(15, 'stopped')", {}, 143, "", "stopped\n"),
        ("raise KeyboardInterrupt", {}, 130, "", "interrupted\n"),
        (
            "raise MemoryError",
            {},
            1,
            "",
            "error: out of memory\nfix:   use a smaller batch size or model, or close other programs\n",
        ),
        (
            "open('/nowhere/file')",
            {},
            2,
            "",
            "error: No such file or directory: /nowhere/file\nfix:   check the path",
        ),
        (
            "raise OSError(27, 'File too large')",
            {},
            2,
            "",
            "error: File too large: the output folder\nfix:   check the path",
        ),
        ("raise ValueError('a bug')", {}, 1, "", "Traceback"),
        (
            "raise ModuleNotFoundError('wrapped') from ModuleNotFoundError('x', name='torch.nn')",
            {},
            2,
            "",
            "error: the Python package torch is not installed\nfix:   run: pip install -r requirements_training.txt",
        ),
    ],
)
def test_how_scripts_end(code, environment, status, stdout, stderr):
    script = f"from sft.cli import *\nfrom sft.cli import Stopped\ndef main():\n    {code}\nrun_script(main)"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        input="Fi\xe8vr\n".encode("latin-1"),
        capture_output=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == status, result.stderr
    assert result.stdout.decode() == stdout
    assert result.stderr.decode().startswith(stderr)


def test_closed_streams(tmp_path):
    """As cron starts a program: what it opens first must not become its standard output."""
    file = tmp_path / "file"
    script = (
        "from sft.cli import run_script\n"
        "def main():\n"
        f"    opened = open({str(file)!r}, 'w')\n"
        "    print('note')\n"
        "    opened.close()\n"
        "run_script(main)"
    )
    result = subprocess.run(["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, script], cwd=ROOT)
    assert result.returncode == 0
    assert file.read_text() == ""


def test_a_closed_pipe_ends_quietly():
    script = "from sft.cli import run_script\ndef main():\n    print('x\\n' * 100_000)\nrun_script(main)"
    command = f'{sys.executable} -c "$0" | head -1; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(["bash", "-c", command, script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 141
    assert result.stderr == ""


# ------------------------------------------------------------------------------- kinds of errors


class PanicException(BaseException):
    """As the tokenizers library raises it."""


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            ),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("unable to mmap 9 bytes from file <f>: Cannot allocate memory (12)"), True),
        (ImportError("/lib/x.so: failed to map segment from shared object"), True),
        (PanicException("The global thread pool has not been initialized.: ..."), True),
        (PanicException("index out of bounds"), False),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOENT, "out of memory"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_recognized(error, expected):
    assert is_out_of_memory(error) is expected


def test_real_out_of_memory_is_recognized():
    with pytest.raises(RuntimeError) as no_room:
        torch.empty(1 << 55)
    with pytest.raises(OSError) as no_map:
        mmap.mmap(-1, 1 << 60)
    assert is_out_of_memory(no_room.value)
    assert is_out_of_memory(no_map.value)


@pytest.mark.parametrize(
    "raised, expected",
    [
        (KeyError("x"), InputError),
        (RecursionError("deep"), InputError),
        (PanicException("panicked"), InputError),
        (InputError("ours", "fix"), InputError),
        (RunError("ours", "fix"), RunError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
    ],
)
def test_a_librarys_exception_becomes_two_lines(raised, expected):
    with pytest.raises(expected) as caught, as_input_error("model: cannot be loaded", "check it"):
        raise raised
    if expected is InputError and not isinstance(raised, InputError):
        name = type(raised).__name__
        assert str(caught.value).startswith(f"model: cannot be loaded: {name}: ")
        assert str(caught.value).endswith("\ncheck it")
    else:
        assert caught.value is raised


def test_no_folder_for_temporary_files_is_two_lines(capsys):
    def main():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 2
    assert "fix:   set TMPDIR" in capsys.readouterr().err


def test_a_full_disk_is_recognized():
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_disk_full(RuntimeError("write failed: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))


# ------------------------------------------------------------------------------- signals


def test_the_first_signal_is_noted_and_the_second_raised(capfd):
    with noted_signals() as noted:
        os.kill(os.getpid(), signal.SIGTERM)
        assert noted == [signal.SIGTERM]
        assert "SIGTERM received" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ignored_signals_stay_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with noted_signals() as noted:
            os.kill(os.getpid(), signal.SIGHUP)
        assert noted == []
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------- processes and progress


def test_processes_are_those_of_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert processes() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes() == (1, 2)
    assert not on_main_process()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="not a number"):
        processes()


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "1"}, {"WORLD_SIZE": "0"}, {"RANK": "-1", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "2"}],
)
def test_processes_that_no_launcher_started_are_refused(monkeypatch, environment):
    """A process that believes to be one of several would write its share and say nothing."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    check_processes()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="no launcher started them\nunset RANK and WORLD_SIZE"):
        check_processes()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    check_processes()


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    lines = io.StringIO()
    monkeypatch.setattr(sys, "stderr", lines)
    progress = Progress(4, "step", done=1, scope=" in this epoch", interval=0)
    progress.advance("loss 2.000, 10 tokens/s")
    progress.advance()
    progress.close()
    first, second = lines.getvalue().splitlines()
    assert first.startswith("  step 2/4, loss 2.000, 10 tokens/s, ")
    assert first.endswith(" min left in this epoch")
    assert "steps/s" in second


def test_progress_is_quiet_on_other_processes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    lines = io.StringIO()
    monkeypatch.setattr(sys, "stderr", lines)
    progress = Progress(2, "note", interval=0)
    progress.advance()
    progress.close()
    assert lines.getvalue() == ""


@pytest.mark.parametrize("command", ["citation_form.py none", "inference_throughput.py --model_path none"])
def test_benchmarks_without_an_adapter_say_so(command):
    program, *arguments = command.split()
    assert_input_error(run_python(f"benchmarks/{program}", *arguments), "none: no such folder")


# ------------------------------------------------------------------------------- words


def test_ids_that_look_like_text_are_not_shown():
    assert [safe_id(text) for text in ("r1", "a/b:2-3#x", "Émile")] == ["r1", "a/b:2-3#x", "Émile"]
    assert {safe_id(text) for text in ("", "two words", "x" * 65, "a\nb", "(a)")} == {"(not shown)"}


def test_lists_and_plurals():
    assert preview_list("abc") == "a, b, c"
    assert preview_list((str(n) for n in range(9)), 2) == "0, 1 and 7 more"
    assert [plural(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
