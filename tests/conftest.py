"""Tiny random models and tokenizers, built here, and a network that is off."""

import csv
import functools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
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


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# BOS in the template, an end of turn that is not EOS, a role token that is not marked special
LLAMA3 = (
    "<s>{% for m in messages %}<|header|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant\n\n{% endif %}"
)
# no system role
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
CHAT_TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "none": None}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "[INST]", "[/INST]"]
CORPUS = [
    "Summarize the clinical note. State only what the note says. The patient reports fever of 38.5 and cough.",
    "Tested positive for influenza A. No chest pain. BP 120/80, HR 72. Denies shortness of breath today.",
    "### Instruction: ### Clinical note: ### Summary: system user assistant Follow up in two weeks with the clinic.",
]


@functools.cache
def tiny_tokenizer(chat: str = "chatml", bos: bool = True):
    """A byte-level BPE of a few hundred tokens. With `bos` the tokenizer puts <s> before a text of its own accord."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens([AddedToken("<|header|>", special=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    eos = "<|im_end|>" if chat == "chatml" else "</s>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token=eos
    )
    fast.chat_template = CHAT_TEMPLATES[chat]
    return fast


def tiny_config(architecture: str):
    import transformers

    sizes = {
        "vocab_size": 420,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "head_dim": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    configs = {
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "llama-wide": lambda: transformers.LlamaConfig(
            **{**sizes, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
        ),
        "mistral": lambda: transformers.MistralConfig(**sizes, sliding_window=24),
        "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in sizes.items() if k != "head_dim"}),
        "gemma": lambda: transformers.GemmaConfig(**sizes),
        "gemma2": lambda: transformers.Gemma2Config(**sizes, sliding_window=24, query_pre_attn_scalar=8),
        "phi3": lambda: transformers.Phi3Config(**{k: v for k, v in sizes.items() if k != "head_dim"}),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=420,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=1024,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        ),
        "bloom": lambda: transformers.BloomConfig(
            vocab_size=420, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
        ),
    }
    return configs[architecture]()


def tiny_model(architecture: str = "llama", seed: int = 0):
    """A random model whose weights are large enough for its outputs to differ between tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(
                    0, 0.5 if any(part in name for part in ("embed", "wte", "lm_head")) else 0.15
                )
    return model.eval()


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


NOTES = [
    (
        "Patient reports fever of 38.5 and cough. Tested positive for influenza A.",
        "Influenza A with fever and cough.",
    ),
    (
        "BP 120/80, HR 72. No chest pain.\nDenies shortness of breath.",
        "No chest pain or shortness of breath.",
    ),
    (
        "Fell from a ladder. Left wrist painful and swollen. X-ray shows no fracture.",
        "Left wrist injury without fracture.",
    ),
    ("Asthma, well controlled. Uses inhaler twice a week.", "Well controlled asthma."),
    ("Day 2 after appendectomy. Pain 3/10. Eating and walking.", "Recovering well after appendectomy."),
    (
        "Headache for three days, worse in the morning. Neurology normal.",
        "Three-day headache, normal neurology.",
    ),
    ("NA 128, K 4.1. Confused since Monday; off thiazide.", "Sodium 128 with confusion, thiazide stopped."),
    ("Routine review. Diabetes. A1c 7.1. Feet normal.", "Diabetes with A1c 7.1 and normal feet."),
    ("Rash on both arms after amoxicillin. No swelling of the face.", "Rash after amoxicillin."),
    (
        "Two weeks of low mood and poor sleep. No thoughts of self-harm.",
        "Low mood and poor sleep, no self-harm.",
    ),
    ("Twisted knee at football. Stable ligaments.", "Knee sprain with stable ligaments."),
]
HEADER = ["id", "clinical_note", "model_summary", "label", "hallucination_type"]


def write_csv(path: Path, rows, header=HEADER) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


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


def assert_mendable(result: subprocess.CompletedProcess, *words: str) -> None:
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
