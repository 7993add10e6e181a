"""Decoding through transformers' `generate`, for models that `sft.inference.decoding.enable_kv_cache`
refuses: slower, in batches padded on the left."""

from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sft.inference.decoding import GeneratedSequence, Settings, make_sequences, sample


@torch.inference_mode()
def decode_with_generate(
    model, prompts: dict[int, list[int]], max_new_tokens: int, stop_ids: Sequence[int], **options
) -> Iterator[GeneratedSequence]:
    """What `decode` does, for any model."""
    settings = Settings(max_new_tokens, stop_ids, **options)
    device = model.get_input_embeddings().weight.device
    pad = stop_ids[0]
    generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        do_sample=False,
        use_cache=True,
    )
    sequences = make_sequences(prompts, settings)
    for start in range(0, len(sequences), settings.batch_size):
        batch = sequences[start : start + settings.batch_size]
        n_padding = [len(batch[0].prompt) - len(sequence.prompt) for sequence in batch]
        rows = [[pad] * n + sequence.prompt for n, sequence in zip(n_padding, batch)]
        mask = [[0] * n + [1] * len(sequence.prompt) for n, sequence in zip(n_padding, batch)]
        model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([_SampleTokens(batch)]),
        )
        yield from (sequence for sequence in batch if sequence.finish_reason)
        if settings.should_stop and settings.should_stop():
            return


class _SampleTokens(LogitsProcessor):
    """Makes `generate` take the tokens that `sample` gives, and adds them to the sequences of the batch."""

    def __init__(self, batch: list[GeneratedSequence]):
        self.batch = batch

    def __call__(self, input_ids, scores):
        settings = self.batch[0].settings
        tokens, log_probs = sample(scores, [(sequence, 0) for sequence in self.batch])
        for sequence, token, log_prob in zip(self.batch, tokens, log_probs):
            if not sequence.finish_reason:
                sequence.add(token, log_prob)
        # One that computed NaN would go on to the length limit
        is_over = settings.should_stop and settings.should_stop()
        ends = [is_over or sequence.finish_reason for sequence in self.batch]
        tokens = [settings.stop_ids[0] if end else token for end, token in zip(ends, tokens)]
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def decode_apart(
    decoder: Callable,
    longest_shared: float,
    model,
    prompts: dict[int, list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    *,
    batch_size: int,
    **options,
) -> Iterator[GeneratedSequence]:
    """`decoder` for the sequences that stay within `longest_shared` tokens (see
    sft.model.probes.longest_shared); `generate`, one by one, for those that may become longer."""
    short = {i: ids for i, ids in prompts.items() if len(ids) + max_new_tokens <= longest_shared}
    yield from decoder(model, short, max_new_tokens, stop_ids, batch_size=batch_size, **options)
    should_stop = options.get("should_stop")
    if not (should_stop and should_stop()):
        long = {i: ids for i, ids in prompts.items() if i not in short}
        yield from decode_with_generate(model, long, max_new_tokens, stop_ids, batch_size=1, **options)
