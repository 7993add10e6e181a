"""How far a model's own probabilities of a summary rest on the note: for evaluation and redrawing."""

from sft.data.prompt import PromptEncoder
from sft.grounding.sentences import sentence_spans


def sentence_support(model, encoder: PromptEncoder, note: str, summary: str) -> list[tuple[float, float]]:
    """(with the note, without it) for each sentence of a summary: the mean log-likelihood of its tokens after
    the prompt and the sentences before it, in nats. Note and summary must fit the context window."""
    import torch

    ends = [end for _, end in sentence_spans(summary)]
    pieces = [summary[start:end] for start, end in zip([0, *ends], ends)]
    note_ids, *piece_ids = encoder.encode_texts([encoder.template.render_note(note), *pieces])
    summary_ids = [token for ids in piece_ids for token in ids]
    if not summary_ids:
        return []
    device = model.get_input_embeddings().weight.device
    n = len(summary_ids)
    means = []
    for prompt in (encoder.prompt(note_ids), encoder.prompt([])):
        tokens = torch.tensor([prompt + summary_ids], device=device)
        with torch.inference_mode():
            logits = model(input_ids=tokens, logits_to_keep=n + 1, use_cache=False).logits[0, -n - 1 : -1]
            log_probs = logits.float().log_softmax(-1).gather(1, tokens[0, -n:, None])[:, 0]
        parts = log_probs.split([len(ids) for ids in piece_ids])
        means.append([part.mean().item() if len(part) else 0.0 for part in parts])
    return list(zip(*means))
