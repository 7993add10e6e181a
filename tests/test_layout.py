"""The layout: which way imports run, what the scripts hand on, telemetry that is off before any library is
imported."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = ["sft_dataset", "stage_a_sft_training", "sft_inference", "sft_evaluation"]

# What each part of the package may import of the others
MAY_IMPORT = {
    "cli": set(),
    "files": {"cli"},
    "option_fields": {"cli"},
    "options": {"cli", "option_fields"},
    "grounding": set(),
    "data": {"cli", "files", "options", "grounding"},
    "model": {"cli", "files", "options"},
    "inference": {"cli", "files", "options", "grounding", "data", "model"},
    "evaluation": {"cli", "files", "option_fields", "options", "grounding", "data", "model", "inference"},
    "training": {
        "cli",
        "files",
        "option_fields",
        "options",
        "grounding",
        "data",
        "model",
        "inference",
        "evaluation",
    },
}


def imported_modules(file) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_one_way(part):
    path = ROOT / "sft" / part
    files = list(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    for file in files:
        for module in imported_modules(file):
            assert module.partition(".")[0] not in SCRIPTS, f"{file} imports a script"
            if module.startswith("sft."):
                imported = module.split(".")[1]
                assert imported == part or imported in MAY_IMPORT[part], f"{file} imports {module}"


def test_every_part_is_listed():
    parts = {path.stem for path in (ROOT / "sft").iterdir() if not path.name.startswith("__")}
    assert parts == set(MAY_IMPORT)


def test_text_needs_no_torch():
    for file in (ROOT / "sft" / "grounding").glob("*.py"):
        assert not {module for module in imported_modules(file) if module.partition(".")[0] == "torch"}, file


def test_what_users_import():
    from sft_dataset import SFTCollator, SFTDataset, create_sft_dataloaders
    from sft_inference import SFTInference
    from stage_a_sft_training import TrainConfig, train

    assert all(
        map(callable, (SFTCollator, SFTDataset, create_sft_dataloaders, SFTInference, TrainConfig, train))
    )


@pytest.mark.parametrize("first", ["", "import transformers, accelerate, peft"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_telemetry_is_off_in_every_entry_point(script, first):
    """Also where the user's own program imported the libraries before."""
    code = f"{first}\nimport {script}\nimport huggingface_hub.constants, os\n"
    code += (
        "print(huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "True 1\n", result.stderr


def test_modules_and_functions_stay_short():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("sft/**/*.py")]:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 450, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"
