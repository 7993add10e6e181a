"""Tiny random models, tokenizers and rows, built in the process. Shared by the tests and by benchmarks."""

import csv
import functools
import random
from pathlib import Path

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
    """A byte-level BPE of a few hundred tokens. With `bos` the tokenizer puts <s> before a text of its own
    accord."""
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
        "phi3-longrope": lambda: transformers.Phi3Config(
            **{k: v for k, v in sizes.items() if k != "head_dim"},
            original_max_position_embeddings=64,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 64,
            },
        ),
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


def rows_of(pairs):
    """Factual rows of (note, summary) pairs, with ids r0, r1, ..."""
    from sft.data.rows import Row

    return [Row(i + 2, f"r{i}", note, summary, "factual") for i, (note, summary) in enumerate(pairs)]


def many_rows(n: int):
    """n factual rows of 1 to 9 notes of `NOTES` each, always the same for the same n."""
    dice = random.Random(n)
    pairs = []
    for i in range(n):
        note = f"Seen {i}. " + " ".join(dice.choice(NOTES)[0] for _ in range(dice.randint(1, 9)))
        pairs.append((note, dice.choice(NOTES)[1]))
    return rows_of(pairs)


def encoder_for(chat: str, **options):
    """The PromptEncoder of a tiny tokenizer; `options` are build_template's."""
    from sft.data.prompt import PromptEncoder, build_template

    tokenizer = tiny_tokenizer(chat)
    return PromptEncoder(tokenizer, build_template(tokenizer, **options))


class CountingTokenizer:
    """A tokenizer that counts its calls and the characters it is given; with `is_fast=False`, like a slow
    one."""

    def __init__(self, tokenizer, is_fast: bool = True):
        self.tokenizer = tokenizer
        self.is_fast = is_fast
        self.calls = 0
        self.characters = 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        self.calls += 1
        self.characters += sum(map(len, [texts] if isinstance(texts, str) else texts))
        return self.tokenizer(texts, **options)


@functools.cache
def selector():
    """Fitted on the bundled training rows."""
    from sft.grounding.selector import fit_selector

    bundled = Path(__file__).resolve().parent.parent / "phase1_data" / "sft" / "train_set_processed.csv"
    with open(bundled, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "factual"]
    return fit_selector((row["clinical_note"], row["model_summary"]) for row in rows)


def quoted(note: str) -> str:
    """The sentences that the selector quotes, a line each."""
    from sft.grounding.selector import quote

    return "\n".join(sentence.text for sentence in quote(note, selector()))
