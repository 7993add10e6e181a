"""How well-formed are the citations that an evidence-trained specialist writes on held-out notes?

    python benchmarks/citation_form.py models/sft_evidence/final_model [--test_csv FILE.csv]

Prints, over the factual rows: the share of summary sentences that end in a citation that parses; of all
"[Evidence", the share that begin a citation that parses; of the parsed ones, the share whose every number is
a sentence of the note; how many of the cited sentences are among those that the reference summary cites; and
in how many summaries the check found a wrong number."""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.cli import log, plural, run_script
from sft.data.rows import Row, factual_rows, read_rows
from sft.grounding.citations import cited_sentence_numbers, strip_citations, unreadable_citations
from sft.grounding.sentences import split_sentences
from sft_inference import SFTInference


def count_forms(row: Row, result: dict) -> Counter:
    """What one generated summary adds to the counts."""
    summary = result["generated_summary"]
    evidence = result["evidence"]
    reference_numbers = set(cited_sentence_numbers(row.model_summary))
    numbers = cited_sentence_numbers(summary)
    return Counter(
        truncated=result["finish_reason"] != "stop",
        sentences=len(split_sentences(strip_citations(summary))),
        cited_sentences=sum(len(split_sentences(citation["claim"])) == 1 for citation in evidence),
        begun=len(evidence) + len(unreadable_citations(summary)),
        parsed=len(evidence),
        existing=sum(not citation["missing"] for citation in evidence),
        numbers=len(numbers),
        agreeing=sum(n in reference_numbers for n in numbers),
        with_unsupported="number" in result["n_findings"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_path")
    parser.add_argument("--test_csv", default="phase1_data/sft/test_set_evidence.csv")
    parser.add_argument("--max_new_tokens", type=int, default=250)
    arguments = parser.parse_args()
    rows = factual_rows(read_rows(arguments.test_csv))
    inference = SFTInference(arguments.model_path, writing="free")
    log(f"Summarizing {plural(len(rows), 'note')}")
    results = inference.generate_batch([row.clinical_note for row in rows], arguments.max_new_tokens)
    counts = Counter(summaries=len(rows))
    for row, result in zip(rows, results):
        counts.update(count_forms(row, result))
    truncated = (
        f"{counts['truncated']} of them stopped in a loop or at --max_new_tokens {arguments.max_new_tokens}"
    )
    print(f"{'summaries':<45} {len(rows)}, {truncated}")
    for description, part, whole in (
        ("sentences that end in a citation", "cited_sentences", "sentences"),
        ("citations begun that parse", "parsed", "begun"),
        ("parsed citations of existing sentences alone", "existing", "parsed"),
        ("cited sentences that the reference cites too", "agreeing", "numbers"),
        ("summaries with a number the check doubts", "with_unsupported", "summaries"),
    ):
        share = counts[part] / max(1, counts[whole])
        print(f"{description:<45} {counts[part]}/{counts[whole]} ({share:.0%})")


if __name__ == "__main__":
    run_script(main)
