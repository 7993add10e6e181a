"""Summaries of validation notes by the weights in memory: written and scored after each epoch
(--n_sample_notes), and whether they come to an end."""

import contextlib
import functools
import json
import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from sft.data.dataset import Example
from sft.evaluation.measures import facts_held
from sft.files import is_bundled, write_atomic
from sft.grounding import PreparedNote
from sft.grounding.citations import strip_citations
from sft.options import BUNDLED_MODEL

if TYPE_CHECKING:
    from sft.inference.decoding import GeneratedSequence
    from sft.training.run import Run


def write_summaries(
    run: "Run", examples: Sequence[Example], max_new_tokens: int
) -> dict[int, "GeneratedSequence | None"]:
    """The greedy summary of each example's prompt, by its place; None if memory does not hold it alone. The
    model is as before at the end."""
    from sft.inference.decoding import decode, decode_within_memory, enable_kv_cache
    from sft.inference.generate import decode_apart, decode_with_generate
    from sft.model.base import context_window
    from sft.model.probes import reference_attention

    base = run.model.get_base_model()
    attention = base.config._attn_implementation
    prompts = {i: example.input_ids[: example.n_prompt] for i, example in enumerate(examples)}
    # Positions beyond the window may not exist; the references fit into it
    window = context_window(base.config) or math.inf
    max_new_tokens = min(max_new_tokens, window - max(map(len, prompts.values())))
    stop_ids = run.train_set.encoder.template.stop_token_ids
    run.model.eval()
    try:
        has_cache = enable_kv_cache(base)[0]
        decoder = decode if has_cache else decode_with_generate
        decoder = functools.partial(decode_apart, decoder, run.longest_shared, base)
        with contextlib.nullcontext() if has_cache else reference_attention(base):
            return dict(
                decode_within_memory(
                    decoder, prompts, max_new_tokens, stop_ids, batch_size=run.config.batch_size
                )
            )
    finally:
        base.set_attn_implementation(attention)
        run.model.train()


def spread(n: int, n_chosen: int) -> list[int]:
    """Up to `n_chosen` places among `n`, evenly spread."""
    n_chosen = min(n_chosen, n)
    return [i * n // n_chosen for i in range(n_chosen)]


def count_endings(run: "Run") -> tuple[int, int]:
    """(how many summaries of final_model come to an end, how many were written): of eight validation notes,
    evenly spread, each as long as inference lets it be."""
    from sft.model.adapter import load_adapter_weights

    load_adapter_weights(run.model, run.output_dir / "final_model", may_be_zero=True)
    # Not the shortest, which end more often
    examples = [run.val_set.examples[i] for i in spread(len(run.val_set), 8)]
    written = write_summaries(run, examples, run.sft_config["max_new_tokens"]).values()
    n_ended = sum(sequence is not None and sequence.finish_reason == "stop" for sequence in written)
    return n_ended, len(examples)


def sample_notes(run: "Run", epoch: int) -> dict[str, float]:
    """Writes the summaries of --n_sample_notes validation notes, evenly spread, to a private file; returns
    their means: ROUGE-L, check score (0 for one that cannot be checked), share of the reference's facts.

    On screen they come for the sample data alone: nobody else's notes may be in a log."""
    from rouge_score.rouge_scorer import RougeScorer

    from sft.inference.endings import ended_text

    places = spread(len(run.val_set), run.config.n_sample_notes)
    rows = [run.val_set.rows[run.val_set.row_indices[i]] for i in places]
    examples = [run.val_set.examples[i] for i in places]
    written = write_summaries(run, examples, run.sft_config["max_new_tokens"])
    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    lines = []
    for i, row in enumerate(rows):
        decode = functools.partial(run.tokenizer.decode, skip_special_tokens=True)
        text = ended_text(written[i], decode)[0] if written[i] else ""
        reference, summary = strip_citations(row.model_summary), strip_citations(text)
        check = PreparedNote(row.clinical_note).check(text)
        is_checked = bool(check.sentences) and check.language == "en"
        held, n_facts = facts_held(reference, summary)
        scores = {
            "rouge_l": rouge.score(reference, summary)["rougeL"].fmeasure,
            "check_score": check.score * is_checked,
        }
        scores |= {"facts_held": held, "facts": n_facts}
        lines.append({"id": row.id, "generated_summary": text, **scores})
    if run.accelerator.is_main_process:
        file = run.output_dir / f"sample_notes_epoch_{epoch}.jsonl"
        write_atomic(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        run.log(f"Saved {len(lines)} summaries of validation notes to {file}")
    if is_sample_data(run):
        run.log("".join(f"  {line['id']}: {' '.join(line['generated_summary'].split())}\n" for line in lines))
    n_facts = sum(line["facts"] for line in lines)
    means = {name: fmean(line[name] for line in lines) for name in ("rouge_l", "check_score")}
    return means | {"coverage": sum(line["facts_held"] for line in lines) / n_facts if n_facts else 0.0}


def is_sample_data(run: "Run") -> bool:
    """Whether base model and rows are the bundled ones: other weights may repeat what they learned from."""
    hashes = run.sft_config["sha256"]
    is_own_base = run.config.model_name == BUNDLED_MODEL and "parent" not in hashes
    return is_own_base and all(is_bundled(hashes.get(name, "none")) for name in ("train_csv", "val_csv"))
