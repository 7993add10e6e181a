"""Fixtures: folders with tiny models, short runs, specialists; no network; helpers that run the scripts."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import NOTES, tiny_model, tiny_tokenizer, write_csv

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
# Started in the background or from cron, these arrive ignored, and the processes that tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)  # tiny matrices: two threads only wait for each other


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that would reach beyond this machine fails."""
    connect = socket.socket.connect

    def guarded(self, address):
        local = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
        assert local, f"a connection to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


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


@pytest.fixture
def csv_files(tmp_path):
    """(training file with 11 factual and 1 hallucinated row, validation file with 3 rows)."""
    train = [(f"t{i}", note, summary, "factual", "") for i, (note, summary) in enumerate(NOTES)]
    train.insert(1, ("t0-h", NOTES[0][0], "Influenza B with fever.", "hallucinated", "wrong_number"))
    validation = [
        (f"v{i}", f"Seen again. {note}", summary, "factual", "")
        for i, (note, summary) in enumerate(NOTES[:3])
    ]
    return write_csv(tmp_path / "train.csv", train), write_csv(tmp_path / "val.csv", validation)


def run_python(
    *arguments, stdin: str | None = None, timeout: float = 300, **environment
) -> subprocess.CompletedProcess:
    """A script of the toolkit as a user runs it, in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="session")
def adapters(model_folder, tmp_path_factory):
    """adapters(architecture, chat, **options): the final_model folder of a short run."""
    from sft.options import TrainConfig
    from stage_a_sft_training import train

    made = {}

    def make(architecture="llama", chat="chatml", evidence=False):
        key = (architecture, chat, evidence)
        if key not in made:
            folder = tmp_path_factory.mktemp("adapter")
            rows = [
                (f"r{i}", n, f"{s} [Evidence: S1; Conf: 0.95]" if evidence else s, "factual", "")
                for i, (n, s) in enumerate(NOTES * (4 if evidence else 2))
            ]
            path = str(write_csv(folder / "rows.csv", rows))
            train(
                TrainConfig(
                    train_csv=path,
                    val_csv=path,
                    model_name=str(model_folder(architecture, chat)),
                    output_dir=str(folder / "out"),
                    num_epochs=2 if not evidence else 12,
                    learning_rate=1e-2,
                    target_modules=["all-linear"],
                    lora_dropout=0.0,
                    max_length=256,
                    device="cpu",
                )
            )
            made[key] = folder / "out" / "final_model"
        return made[key]

    return make


@pytest.fixture(scope="session")
def specialist(adapters):
    from sft_inference import SFTInference

    return SFTInference(adapters(), device="cpu")


def run_inference(*arguments, **options) -> subprocess.CompletedProcess:
    return run_python("sft_inference.py", "--device", "cpu", *arguments, **options)


def assert_input_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit status 2, at most two lines, no traceback, the given words in them."""
    lines = result.stderr.strip().split("\n")
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert len(lines) <= 2 and lines[0].startswith("error: "), result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.fixture
def configured(csv_files, model_folder, tmp_path):
    """configured(output name, **options): the configuration of a short run of a tiny model."""

    def make(name: str = "out", architecture: str = "llama", chat: str = "chatml", **options):
        from sft.options import TrainConfig

        values = {
            "num_epochs": 2,
            "batch_size": 4,
            "lora_r": 4,
            "lora_dropout": 0.1,
            "learning_rate": 5e-3,
            "max_length": 256,
            "device": "cpu",
        }
        paths = {
            "train_csv": str(csv_files[0]),
            "val_csv": str(csv_files[1]),
            "output_dir": str(tmp_path / name),
        }
        return TrainConfig(
            **{**paths, "model_name": str(model_folder(architecture, chat)), **values, **options}
        )

    return make


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


def metrics_of(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]


def adapter_of(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(f"{folder}/adapter_model.safetensors")


def assert_same_adapter(one, two) -> None:
    import torch

    first, second = adapter_of(one), adapter_of(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def wait_for_updates(output_dir: Path, updates: int, seconds: float = 120) -> None:
    """Until a run in another process has done so many updates."""
    metrics, end = output_dir / "metrics.jsonl", time.monotonic() + seconds
    while not metrics.is_file() or metrics.read_text().count("\n") < updates:
        assert time.monotonic() < end, "the run does not come forward"
        time.sleep(0.005)
