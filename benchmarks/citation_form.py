"""How well-formed are the citations that an evidence-trained specialist writes on held-out notes?

    python benchmarks/citation_form.py models/sft_evidence/final_model [--test_csv phase1_data/sft/test_set_evidence.csv]

Prints, over the factual rows: the share of summary sentences that end in a citation that parses; among all citations
begun ("[Evidence"), the share that parse; among parsed ones, the share whose every number is a sentence of the note;
how many of the cited sentences are among those the reference summary cites; and how many summaries state a number that
the note does not hold.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.cli import log
from sft.data.rows import factual_rows, read_rows
from sft.grounding.citations import cited_sentence_numbers, strip_citations
from sft.grounding.numbers import unsupported_numbers
from sft.grounding.sentences import split_sentences
from sft_inference import SFTInference


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_path")
    parser.add_argument("--test_csv", default="phase1_data/sft/test_set_evidence.csv")
    parser.add_argument("--max_new_tokens", type=int, default=250)
    arguments = parser.parse_args()
    rows = factual_rows(read_rows(arguments.test_csv), arguments.test_csv)
    inference = SFTInference(arguments.model_path)
    log(f"Summarising {len(rows)} notes")
    results = inference.generate_batch([row.clinical_note for row in rows], arguments.max_new_tokens)
    sentences = cited = begun = parsed = existing = numbers = agreeing = cut = invented = 0
    for row, result in zip(rows, results):
        summary = result["generated_summary"]
        cut += result["finish_reason"] == "length"
        sentences += len(split_sentences(strip_citations(summary)))
        cited += sum(len(split_sentences(citation["claim"])) == 1 for citation in result["evidence"])
        begun += len(re.findall(r"\[\s*evidence", summary, re.IGNORECASE))
        parsed += len(result["evidence"])
        existing += sum(not citation["missing"] for citation in result["evidence"])
        reference = set(cited_sentence_numbers(row.model_summary))
        written = cited_sentence_numbers(summary)
        numbers += len(written)
        agreeing += sum(n in reference for n in written)
        invented += bool(unsupported_numbers(summary, row.clinical_note))
    print(
        f"summaries                                     {len(rows)}, {cut} of them cut at --max_new_tokens {arguments.max_new_tokens}"
    )
    print(
        f"sentences that end in a citation              {cited}/{sentences} ({cited / max(1, sentences):.0%})"
    )
    print(f"citations begun that parse                    {parsed}/{begun} ({parsed / max(1, begun):.0%})")
    print(
        f"parsed citations of existing sentences alone  {existing}/{parsed} ({existing / max(1, parsed):.0%})"
    )
    print(
        f"cited sentences that the reference cites too  {agreeing}/{numbers} ({agreeing / max(1, numbers):.0%})"
    )
    print(
        f"summaries with a number the note lacks        {invented}/{len(rows)} ({invented / len(rows):.0%})"
    )


if __name__ == "__main__":
    main()
