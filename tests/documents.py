"""The blocks of the documents, their marks (see test_documents.py), and the copy of the repository
in which they run."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from forked import write_shim
from markdown_it import MarkdownIt

GUIDE = "STAGE_A_SFT_GUIDE.md"
CARDS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("phase1_data/**/README.md"))]
DOCUMENTS = ["README.md", GUIDE, "CONTRIBUTING.md", *CARDS]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
MARKDOWN = MarkdownIt("commonmark").enable("table")
TOKENS = {name: MARKDOWN.parse(text) for name, text in TEXTS.items()}


# ------------------------------------------------------------------------------- blocks and their marks


@dataclass(frozen=True)
class Block:
    file: str
    line: int
    language: str
    text: str
    marks: tuple[str, ...]

    def mark(self, start: str) -> str | None:
        """What follows `start` in the block's marks; None if none starts so."""
        found = [mark.removeprefix(start).lstrip(", ") for mark in self.marks if mark.startswith(start)]
        return found[0] if found else None

    @property
    def how(self) -> str:
        return "; ".join(self.marks) or ("as written" if self.language in ("sh", "console", "python") else "")

    @property
    def commands(self) -> list[str]:
        """The commands as they are run, with continuation lines joined."""
        text = self.text.replace("\\\n", " ")
        lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [self.replaced(re.sub(r"\s+#\s.*", "", line)) for line in lines]

    def replaced(self, text: str) -> str:
        for pair in filter(None, (self.mark("with ") or "").split("; ")):
            old, new = pair.split(" => ")
            assert old in self.text, f"{self.file}:{self.line}: no {old}"
            text = text.replace(old, new)
        return text


def find_blocks(file: str) -> list[Block]:
    blocks = []
    marks = []
    for token in TOKENS[file]:
        if token.type == "html_block":
            marks += re.findall(r"<!-- run: (.*?) -->", token.content)
        elif token.type in ("fence", "code_block"):
            blocks.append(Block(file, token.map[0] + 1, token.info, token.content.rstrip("\n"), tuple(marks)))
            marks = []
        elif token.content.strip():
            assert not marks, f"{file}:{token.map}: a mark without a block"
    return blocks


BLOCKS = [block for name in DOCUMENTS for block in find_blocks(name)]


def named(blocks: list[Block]) -> dict:
    return {"argvalues": blocks, "ids": [f"{block.file}:{block.line}" for block in blocks]}


# ------------------------------------------------------------------------------- the sandbox


def cut(source: Path, target: Path, n_rows: int, columns: dict | None = None) -> None:
    """Writes the first rows of a CSV; `columns`: new names of those to keep."""
    with open(source, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:n_rows]
    columns = columns or {name: name for name in rows[0]}
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns.values())
        writer.writerows([row[name] for name in columns] for row in rows)


def write_tiny_model(folder: Path) -> None:
    """The bundled model's tokenizer with random weights, so that counts of tokens are the real ones."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft.model.base import bundled_model

    bundled = bundled_model()
    shutil.copytree(bundled, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(bundled)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    config.update({**sizes, "num_attention_heads": 2, "num_key_value_heads": 1})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


class Sandbox:
    """A copy of the repository in which commands run; every `python` in it is forked (see forked.py)."""

    def __init__(self, folder: Path):
        self.root = folder / "clinical"
        copied = shutil.ignore_patterns(".*", "__pycache__", "models", "wheelhouse")
        shutil.copytree(ROOT, self.root, ignore=copied)
        self.whole = shutil.copytree(ROOT / "phase1_data" / "sft", folder / "whole")
        write_tiny_model(self.root / "models" / "base" / "smollm2-135m-instruct")
        self.write_files_of_the_user()
        programs = self.root / ".venv" / "bin"
        programs.mkdir(parents=True)
        write_shim(programs / "python", folder / "socket")
        (programs / "pip").symlink_to(shutil.which("true"))  # all is installed
        (programs / "ruff").symlink_to(Path(sys.executable).with_name("ruff"))
        for name in (".setup", ".setup_dev"):
            (self.root / ".venv" / name).touch()
        own = {"PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment = {**os.environ, **own}
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "forked.py"), str(folder / "socket")],
            cwd=self.root,
            env=self.environment,
            start_new_session=True,
        )
        while not (folder / "socket").exists():
            assert self.server.poll() is None
            time.sleep(0.05)
        self.outputs = {}
        self.first_models = folder / "models"
        self.train_specialists()

    def write_files_of_the_user(self) -> None:
        note = "clinical_note"
        cut(self.whole / "train_set_processed.csv", self.root / "my_train.csv", 24)
        shutil.copy(self.whole / "train_set_processed.csv", self.root / "train.csv")
        cut(self.whole / "validation_set_processed.csv", self.root / "my_val.csv", 6)
        test = self.whole / "test_set_processed.csv"
        cut(test, self.root / "test.csv", 6)
        cut(test, self.root / "notes.csv", 4, {"id": "id", note: note})
        cut(test, self.root / "new.csv", 4, {"id": "id", note: note})
        cut(test, self.root / "export.csv", 4, {"id": "hadm_id", note: "text", "label": "ward"})
        with open(test, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        pairs = [{"input": row[note], "output": row["model_summary"]} for row in rows[:40:2]]
        (self.root / "alpaca.json").write_text(json.dumps(pairs))
        (self.root / "note.txt").write_text(rows[0][note])
        (self.root / "letters").mkdir()
        for row in rows[:4:2]:
            (self.root / "letters" / f"{row['id']}.txt").write_text(row[note])

    def train_specialists(self) -> None:
        """`make train`, then the other folders that commands name."""
        self.run("make train", small=())
        specialist = "models/sft_specialist/final_model"
        self.run(f"python sft_inference.py --model_path {specialist} --merge_to models/merged")
        models = self.root / "models"
        shutil.copytree(self.root / specialist, models / "sft_evidence" / "final_model")
        dpo = models / "dpo"
        dpo.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(self.root / specialist / name, dpo)
        (self.root / "FOLDER").symlink_to(self.root / specialist)
        shutil.copytree(models, self.first_models, copy_function=os.link)

    def reset(self) -> None:
        """The models as they were at first."""
        for folder in self.first_models.iterdir():
            shutil.rmtree(self.root / "models" / folder.name, ignore_errors=True)
            shutil.copytree(folder, self.root / "models" / folder.name, copy_function=os.link)

    def prepare(self, command: str, small: tuple[str, ...] | None) -> None:
        """Small CSVs for what trains or evaluates; no outputs in the way; a model of every name."""
        trains = "stage_a_sft_training.py" in command or "make train" in command
        evaluates = "sft_evaluation.py" in command or "make evaluate" in command
        if small is None:
            small = ("train", "validation") * trains + ("test",) * evaluates
        for source in self.whole.glob("*.csv"):
            target = self.root / "phase1_data" / "sft" / source.name
            shutil.copy(source, target)
            if source.name.startswith(small) and small:
                cut(source, target, 24 if source.name.startswith("train") else 8)
        outputs = r"--(?:output_dir|output_file|review_file|merge_to|export_preferences|write) (\S+)"
        written = re.findall(outputs, command)
        if trains and "--output_dir" not in command:
            written.append("models/sft_specialist")
        if not re.search("--(resume|overwrite|dry_run|systems|ratings)", command):
            for name in written:
                shutil.rmtree(self.root / name, ignore_errors=True)
                (self.root / name).unlink(missing_ok=True)
        for name in re.findall(r"--(?:model_name|base_model) (\S+/\S+)", command):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            if not (self.root / name).exists():
                (self.root / name).symlink_to(self.root / "models" / "base" / "smollm2-135m-instruct")

    def run(self, command: str, *, status: int = 0, small=None, **environment) -> tuple[str, str]:
        """(standard output, standard error) of a line of a shell."""
        self.prepare(command, small)
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.root,
            env={**self.environment, **environment},
            input="Cough for two days. No fever.\n",
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == status, f"{command}\n{result.stdout}{result.stderr}"
        self.outputs.setdefault(command, result.stdout + result.stderr)
        return result.stdout, result.stderr

    def parse(self, command: str) -> None:
        """Parses the options of each of our scripts in a line of a shell."""
        words = list(shlex.shlex(command, posix=True, punctuation_chars=True))
        for start, word in enumerate(words):
            if re.fullmatch(r"(benchmarks/|tests/)?\w+\.py", word):
                ends = [i for i, w in enumerate(words) if i > start and re.fullmatch(r"[<>|&;]+|\.\.\.", w)]
                options = words[start + 1 : ends[0] if ends else None]
                line = shlex.join(["python", word, *options])
                result = subprocess.run(
                    ["bash", "-c", line],
                    cwd=self.root,
                    env={**self.environment, "PARSE_ONLY": "1"},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                )
                assert result.returncode == 0, f"{line}\n{result.stderr}"

    def close(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()
