"""The rows of training_throughput.py: a file in the order in which all peers train on it."""

import argparse
import csv
import random
from collections import defaultdict

from sft.data.dataset import SFTDataset, load_datasets, read_data
from sft.data.rows import COLUMNS, Row, factual_rows, read_rows
from sft.files import ROOT
from sft.options import DataOptions
from sft.training.run import epoch_order

FILES = {
    "mts": ROOT.parent / "shared" / "data" / "mts_dialog" / "train.csv",
    "phase1": ROOT / "phase1_data" / "sft" / "train_set_processed.csv",
}
BATCH_SIZE = 8
SEED = 42
MAX_LENGTH = 512
SHORT_ROWS = (60, 120)  # tokens of prompt and summary
DEGREES = "small, mild, moderate, faint, marked".split(", ")
FINDINGS = "opacity, nodule, effusion, cyst, edema, calcification, thickening, fracture".split(", ")
PLACES = "upper lobe, lower lobe, lung base, hilum, kidney, adrenal gland, hip, seventh rib".split(", ")


def invented_row(chance: random.Random, number: int) -> Row:
    """A radiology report of one to six findings, and an impression of one to three of them."""
    findings = []
    for _ in range(chance.randint(1, 6)):
        degree, what, side, where = map(chance.choice, (DEGREES, FINDINGS, ["left", "right"], PLACES))
        size = chance.choice(
            [f" of {chance.randint(2, 60)} mm", "", ", unchanged", ", new since the last study"]
        )
        findings.append(f"{degree} {what} of the {side} {where}{size}")
    person = f"{chance.randint(30, 90)}-year-old {chance.choice(['man', 'woman'])}"
    study = f"{chance.choice(['CT', 'MRI', 'Radiograph'])}, {person}."
    note = " ".join([study, *(f"There is a {finding}." for finding in findings)])
    summary = "; ".join(findings[: chance.randint(1, 3)]).capitalize() + "."
    return Row(number, f"short-{number}", note, summary, "factual")


def short_rows(n_rows: int, encoder) -> list[Row]:
    """Invented rows whose lengths are drawn evenly from SHORT_ROWS."""
    chance = random.Random(SEED)
    made = [invented_row(chance, number) for number in range(20 * n_rows)]
    by_length = defaultdict(list)
    for row, example in zip(made, SFTDataset(made, encoder, MAX_LENGTH).examples, strict=True):
        by_length[example.n_tokens].append(row)
    rows = []
    while len(rows) < n_rows:
        found = by_length[chance.randint(*SHORT_ROWS)]
        rows += [found.pop()] if found else []
    return rows


def write_rows(options: argparse.Namespace) -> dict:
    """Writes the rows of a shape to options.train_csv; returns what must be computed to train on those that
    are timed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft.data.prompt import PromptEncoder, build_template
    from sft.model.base import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(options.model_name)
    encoder = PromptEncoder(tokenizer, build_template(tokenizer))
    if options.rows[0] == "short":
        rows = short_rows(options.n_rows, encoder)
    else:
        rows = factual_rows(read_rows(FILES[options.rows[0]]))
        refused = {row_id for row_id, _ in SFTDataset(rows, encoder, MAX_LENGTH).refused}
        rows = random.Random(SEED).sample([row for row in rows if row.id not in refused], options.n_rows)
    rows.sort(key=lambda row: len(row.clinical_note) + len(row.model_summary))
    rest = rows[BATCH_SIZE:]  # of which the longest would else come last
    random.Random(SEED).shuffle(rest)
    # Trained on with the shortest first
    order = epoch_order(len(rows), SEED, 0)
    rows = [row for _, row in sorted(zip(order, rows[:BATCH_SIZE] + rest))]
    with open(options.train_csv, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, column) for column in COLUMNS] for row in rows)

    timed = load_rows(options)[0][BATCH_SIZE:]
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(resolve_model(options.model_name))
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight
    tables = (head, model.get_input_embeddings().weight)
    n_weights = sum(p.numel() for p in model.parameters() if all(p is not table for table in tables))
    lengths = [example.n_tokens for example in timed]
    n_target_tokens = sum(example.n_target_tokens for example in timed)
    return {
        "n_rows": len(timed),
        "n_tokens": sum(lengths),
        "n_target_tokens": n_target_tokens,
        "shortest": min(lengths),
        "longest": max(lengths),
        # Frozen layers: 2 FLOP a weight and token, forward and backward; the output layer for targets alone
        "needed_flop": 4 * n_weights * sum(lengths) + 4 * head.numel() * n_target_tokens,
    }


def load_rows(options: argparse.Namespace):
    """(examples in the order of this toolkit's first epoch, or those of its first --n_steps, and the
    tokenizer)."""
    from sft.model.base import load_tokenizer

    tokenizer = load_tokenizer(options.model_name)
    data = DataOptions(train_csv=options.train_csv, val_csv=options.train_csv, max_length=MAX_LENGTH)
    dataset, _ = load_datasets(read_data(data), tokenizer, data)
    order = epoch_order(len(dataset), SEED, 0)[: options.n_steps and options.n_steps * BATCH_SIZE]
    return [dataset.examples[i] for i in order], tokenizer
