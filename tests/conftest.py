"""Fixtures (folders with tiny models, short runs, specialists), a network that is off, and helpers that run
the scripts."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hypothesis
import pytest
from tiny import NOTES, tiny_model, tiny_tokenizer, write_csv

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))

# Tiny matrices: two threads only wait for each other
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

# The first example of a test loads libraries, and machines are shared: no example has a time limit
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# In the background or from cron these arrive ignored, and the processes that tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that would reach beyond this machine fails."""
    connect = socket.socket.connect

    def guarded(self, address):
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        assert local, f"a connection to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


# ------------------------------------------------------------------------------- files and models


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """model_folder(architecture, chat): a folder with a tiny model and its tokenizer."""

    @functools.cache
    def make(architecture: str = "llama", chat: str = "chatml") -> Path:
        folder = tmp_path_factory.mktemp("base") / f"{architecture}-{chat}"
        tiny_model(architecture).save_pretrained(folder)
        tiny_tokenizer(chat).save_pretrained(folder)
        return folder

    return make


def write_csv_files(folder: Path) -> tuple[Path, Path]:
    """(training file with 11 factual and 1 hallucinated row, validation file with 3 rows)."""
    train = [(f"t{i}", note, summary, "factual", "") for i, (note, summary) in enumerate(NOTES)]
    train.insert(1, ("t0-h", NOTES[0][0], "Influenza B with fever.", "hallucinated", "wrong_number"))
    validation = [
        (f"v{i}", f"Seen again. {note}", summary, "factual", "")
        for i, (note, summary) in enumerate(NOTES[:3])
    ]
    return write_csv(folder / "train.csv", train), write_csv(folder / "val.csv", validation)


@pytest.fixture
def csv_files(tmp_path):
    return write_csv_files(tmp_path)


# ------------------------------------------------------------------------------- short runs


def short_run(model: Path, csv_files: tuple[Path, Path], output_dir: Path, **options):
    """The configuration of a run of six steps."""
    from stage_a_sft_training import TrainConfig

    values = {
        "train_csv": str(csv_files[0]),
        "val_csv": str(csv_files[1]),
        "model_name": str(model),
        "output_dir": str(output_dir),
        "num_epochs": 2,
        "batch_size": 4,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "learning_rate": 5e-3,
        "max_length": 256,
        "device": "cpu",
    }
    return TrainConfig(**{**values, **options})


@pytest.fixture
def configured(csv_files, model_folder, tmp_path):
    """configured(output name, architecture, chat, **options): the configuration of a short run, not trained
    yet."""

    def make(name: str = "out", architecture: str = "llama", chat: str = "chatml", **options):
        return short_run(model_folder(architecture, chat), csv_files, tmp_path / name, **options)

    return make


@pytest.fixture(scope="session")
def finished(model_folder, tmp_path_factory):
    """finished(**options): a short run that was trained, once for all tests: read its folder, change nothing
    in it.

    Its rows are those of `csv_files`, so a run of `configured` with the same options must end the same.
    """
    from stage_a_sft_training import train

    made = {}

    def make(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp("finished")
            made[key] = short_run(model_folder(), write_csv_files(folder), folder / "out", **options)
            train(made[key])
        return made[key]

    return make


@pytest.fixture
def copied(finished, tmp_path):
    """copied(**options): the output folder of a finished run, copied for one test to damage."""

    def make(**options) -> Path:
        return shutil.copytree(finished(**options).output_dir, tmp_path / "out")

    return make


def state_of(folder: Path) -> dict:
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def adapters(model_folder, tmp_path_factory):
    """adapters(architecture, chat, evidence): the final_model folder of a run that learns its rows by
    heart."""
    from stage_a_sft_training import train

    @functools.cache
    def trained(architecture: str, chat: str, evidence: bool) -> Path:
        folder = tmp_path_factory.mktemp("adapter")
        mark = " [Evidence: S1; Conf: 0.95]" if evidence else ""
        pairs = NOTES * (4 if evidence else 2)
        rows = [(f"r{i}", note, f"{summary}{mark}", "factual", "") for i, (note, summary) in enumerate(pairs)]
        path = write_csv(folder / "rows.csv", rows)
        config = short_run(
            model_folder(architecture, chat),
            (path, path),
            folder / "out",
            num_epochs=12 if evidence else 2,
            batch_size=8,
            lora_r=16,
            learning_rate=1e-2,
            target_modules=["all-linear"],
            lora_dropout=0.0,
        )
        train(config)
        return folder / "out" / "final_model"

    def make(architecture: str = "llama", chat: str = "chatml", evidence: bool = False) -> Path:
        return trained(architecture, chat, evidence)

    return make


@pytest.fixture(scope="session")
def specialist(adapters):
    from sft_inference import SFTInference

    return SFTInference(adapters(), device="cpu")


# ------------------------------------------------------------------------------- running the scripts


def start_python(*arguments, **environment) -> subprocess.Popen:
    """A script of the toolkit as a user runs it, in a process of its own; `communicate_or_kill` ends it."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONFAULTHANDLER": "1", **environment},
    )


def descendants(pid: int) -> list[int]:
    """The process, then its children, theirs, ..."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(found for child in children for found in descendants(int(child)))]


def communicate_or_kill(process: subprocess.Popen, timeout: float, stdin: str | None = None) -> tuple:
    """(standard output, standard error). A process that hangs is killed with all it started; the failure
    shows where each of its threads was."""
    try:
        return process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        hung = descendants(process.pid)
        for number in (signal.SIGABRT, signal.SIGKILL):  # Python's fault handler answers the first
            for pid in reversed(hung):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(2)
        out, said = process.communicate()
        pytest.fail(f"no end after {timeout} s\n{out}\n{said}")


def run_python(
    *arguments, stdin: str | None = None, timeout: float = 200, **environment
) -> subprocess.CompletedProcess:
    """A script of the toolkit, from its start to its end."""
    process = start_python(*arguments, **environment)
    out, said = communicate_or_kill(process, timeout, stdin)
    return subprocess.CompletedProcess(process.args, process.returncode, out, said)


def run_inference(*arguments, **options) -> subprocess.CompletedProcess:
    return run_python("sft_inference.py", "--device", "cpu", *arguments, **options)


def arguments_of(config) -> list[str]:
    """The command line of a configuration."""
    arguments = []
    for name, value in vars(config).items():
        if value is True:
            arguments.append(f"--{name}")
        elif isinstance(value, list):
            arguments += [f"--{name}", *value]
        elif value is not None and value is not False:
            arguments.append(f"--{name}={value}")
    return arguments


def wait_for_steps(output_dir: Path, n_steps: int, seconds: float = 120) -> None:
    """Until a run in another process has done that many steps."""
    metrics = output_dir / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while not metrics.is_file() or metrics.read_text().count('"loss"') < n_steps:
        assert time.monotonic() < deadline, "the run makes no progress"
        time.sleep(0.005)


# ------------------------------------------------------------------------------- what came out


def lines_of(config) -> list[dict]:
    """metrics.jsonl: a line for each step and each validation."""
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def metrics_of(config) -> list[dict]:
    """Its steps."""
    return [line for line in lines_of(config) if "val_loss" not in line]


def stats_of(config) -> dict:
    return json.loads((Path(config.output_dir) / "training_stats.json").read_text())


def adapter_of(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(f"{folder}/adapter_model.safetensors")


def assert_same_adapter(one, two) -> None:
    import torch

    first = adapter_of(one)
    second = adapter_of(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def assert_same_run(config, reference) -> None:
    """Adapter, metrics and losses of two runs, to the bit."""
    assert lines_of(config) == lines_of(reference)
    assert_same_adapter(f"{config.output_dir}/final_model", f"{reference.output_dir}/final_model")
    losses = [
        [(epoch["train_loss"], epoch["val_loss"]) for epoch in stats_of(run)["epochs"]]
        for run in (config, reference)
    ]
    assert losses[0] == losses[1]


def assert_input_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit status 2, at most two lines, no traceback, the given words in them."""
    lines = result.stderr.strip().split("\n")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert len(lines) <= 2, result.stderr
    assert lines[0].startswith("error: "), result.stderr
    assert all(word in result.stderr for word in words), result.stderr
