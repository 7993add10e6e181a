"""Preference pairs for Stage B (DPO): each hallucinated summary beside a factual one of the same note, with
the prompt and the tokens of Stage A.

A pair has the texts `prompt`, `chosen`, `rejected` (TRL's format, https://huggingface.co/docs/trl/dataset_formats)
and the same as token ids, `prompt_ids`, `chosen_ids`, `rejected_ids` (what TRL's DPO collator takes). The ids
are Stage A's own. TRL's DPOTrainer (read in 1.16) tokenizes the texts again: the tokenizer adds its BOS, and
EOS is appended to an answer that does not end in it. So a text has no BOS where the tokenizer writes one,
and the tokenizer needs the end of turn as its EOS (`end_of_turn`). Then the texts give the same ids, unless a
note holds a control token as text, or tokens merge where note and template meet: `differing_texts` finds
those."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from sft.cli import InputError, log, plural, preview_list, safe_id
from sft.data.dataset import encode_example
from sft.data.prompt import PromptEncoder
from sft.data.rows import Row, contradicted_texts, factual_rows, name_rows
from sft.files import write_atomic


def find_pairs(path: str, rows: Sequence[Row], encoder: PromptEncoder, max_length: int) -> list[dict]:
    """The pairs in `rows` of the file `path`, each note shortened as Stage A shortens it beside its factual
    summary. Logs which hallucinated rows are left out, and why. Raises InputError if there is no pair.

    A summary that has both labels for the same note is used on neither side."""
    contradicted = contradicted_texts(rows)
    factual = {}
    for row in factual_rows(rows):
        if row.texts_key not in contradicted:
            factual.setdefault(row.note_key, row)
    pairs = []
    left_out = defaultdict(list)
    for row in rows:
        if row.label != "hallucinated":
            continue
        if row.texts_key in contradicted:
            left_out["whose summary another row of the same note calls factual"].append(row.name)
        elif row.note_key not in factual:
            left_out["without a factual summary of the same note"].append(row.name)
        elif pair := _encode_pair(row, factual[row.note_key], encoder, max_length):
            pairs.append(pair)
        else:
            left_out["whose note and factual summary do not fit --max_length"].append(row.name)
    for reason, names in left_out.items():
        log(f"warning: no pair for {plural(len(names), 'hallucinated row')} {reason}: {name_rows(names)}")
    if not pairs:
        n_rows = plural(sum(row.label == "hallucinated" for row in rows), "hallucinated row")
        problem = f"--export_preferences: {path} holds no pair of summaries of one note ({n_rows})"
        raise InputError(problem, "give a hallucinated row the same clinical_note as a factual one")
    return pairs


def _encode_pair(rejected: Row, chosen: Row, encoder: PromptEncoder, max_length: int) -> dict | None:
    """The pair as texts and ids; None if Stage A left the factual row out."""
    template = encoder.template
    tokenizer = encoder.tokenizer
    note = template.render_note(chosen.clinical_note)
    note_ids, chosen_ids, rejected_ids = encoder.encode_texts(
        [note, chosen.model_summary, rejected.model_summary]
    )
    encoded = encode_example(chosen, note_ids, chosen_ids, encoder, max_length)
    if isinstance(encoded, int):
        return None
    prompt_ids = encoded.input_ids[: encoded.n_prompt]
    if encoded.shortened:
        kept = prompt_ids[len(encoder.prefix_ids) : len(prompt_ids) - len(encoder.suffix_ids)]
        note = tokenizer.decode(kept, clean_up_tokenization_spaces=False)
    prompt = template.prefix + note + template.suffix
    # The tokenizer writes it
    bos = tokenizer.bos_token
    if bos and prompt.startswith(bos) and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        prompt = prompt.removeprefix(bos)
    return {
        "id": rejected.id,
        "factual_id": chosen.id,
        "hallucination_type": rejected.hallucination_type,
        "shortened": encoded.shortened,
        "prompt": prompt,
        "chosen": chosen.model_summary,
        "rejected": rejected.model_summary,
        "prompt_ids": prompt_ids,
        "chosen_ids": [*chosen_ids, template.end_token_id],
        "rejected_ids": [*rejected_ids, template.end_token_id],
    }


def end_of_turn(encoder: PromptEncoder) -> str:
    """The token that ends a summary, as text: what Stage B's tokenizer needs as its eos_token."""
    return encoder.tokenizer.convert_ids_to_tokens(encoder.template.end_token_id)


def differing_texts(pairs: Sequence[dict], encoder: PromptEncoder) -> list[str]:
    """The ids of the pairs whose texts do not give their token ids, tokenized as TRL does."""
    end = end_of_turn(encoder)

    def differs(pair: dict, answer: str) -> bool:
        ids = encoder.tokenizer(pair["prompt"] + pair[answer] + end).input_ids
        return ids != pair["prompt_ids"] + pair[f"{answer}_ids"]

    return [pair["id"] for pair in pairs if differs(pair, "chosen") or differs(pair, "rejected")]


def export_pairs(path: Path, pairs: Sequence[dict], encoder: PromptEncoder) -> None:
    """Writes the pairs as JSON Lines, and says what Stage B must know about them."""
    write_atomic(path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    n_shortened = sum(pair["shortened"] for pair in pairs)
    answers = [max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs]
    longest = max(len(pair["prompt_ids"]) + answer for pair, answer in zip(pairs, answers))
    counts = f"{plural(n_shortened, 'note')} shortened, {longest:,} tokens at most"
    log(f"Wrote {plural(len(pairs), 'preference pair')} to {path}: {counts}")
    end = end_of_turn(encoder)
    if end != encoder.tokenizer.eos_token:
        log(f'info: in Stage B set tokenizer.eos_token = "{end}", which ends a summary (guide, section 11)')
    differing = differing_texts(pairs, encoder)
    if differing:
        named = f"{plural(len(differing), 'pair')} ({preview_list(map(safe_id, differing))})"
        advice = "train on the columns prompt_ids, chosen_ids, rejected_ids (guide, section 11)"
        log(f"warning: the texts of {named} have other tokens than in Stage A; {advice}")
