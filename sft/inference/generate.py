"""Decoding through transformers' `generate`, for models that `sft.inference.decoding.enable_kv_cache`
refuses."""

from collections.abc import Callable, Iterator, Sequence, Set

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sft.inference.decoding import GeneratedSequence, make_sequences, sample
from sft.options import DEFAULT_GENERATION_BATCH_SIZE


@torch.inference_mode()
def decode_with_generate(
    model,
    prompts: dict[int, list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    *,
    temperature: float = 0.0,
    batch_size: int = DEFAULT_GENERATION_BATCH_SIZE,
    seed: int = 0,
    numbers: Set[int] = frozenset(),
    on_token: Callable[[GeneratedSequence], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[GeneratedSequence]:
    """What `decode` does, through transformers' `generate`, for models that `enable_kv_cache` refuses:
    batches padded on the left."""
    device = model.get_input_embeddings().weight.device
    pad = stop_ids[0]
    generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        do_sample=False,
        use_cache=True,
    )
    criteria = StoppingCriteriaList([_StopWhenAsked(should_stop)] if should_stop else [])

    def write(sequence: GeneratedSequence, token: int, log_prob: float) -> None:
        sequence.add(token, log_prob, stop_ids, max_new_tokens)
        if on_token:
            on_token(sequence)

    sequences = make_sequences(prompts, seed, numbers)
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        longest = len(batch[0].prompt)
        n_padding = [longest - len(sequence.prompt) for sequence in batch]
        rows = [[pad] * n + sequence.prompt for n, sequence in zip(n_padding, batch)]
        mask = [[0] * n + [1] * (longest - n) for n in n_padding]
        model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=generation_config,
            logits_processor=LogitsProcessorList([_SampleTokens(batch, temperature, pad, write)]),
            stopping_criteria=criteria,
        )
        yield from (sequence for sequence in batch if sequence.finish_reason)
        if should_stop and should_stop():
            return


def decode_apart(
    decoder: Callable,
    longest_shared: float,
    model,
    prompts: dict[int, list[int]],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    *,
    should_stop: Callable[[], bool] | None = None,
    batch_size: int,
    **options,
) -> Iterator[GeneratedSequence]:
    """`decoder` for the sequences that stay within `longest_shared` tokens (see
    sft.model.probes.longest_shared); `generate`, one by one, for those that may become longer."""
    options |= {"should_stop": should_stop}
    short = {i: ids for i, ids in prompts.items() if len(ids) + max_new_tokens <= longest_shared}
    yield from decoder(model, short, max_new_tokens, stop_ids, batch_size=batch_size, **options)
    if not (should_stop and should_stop()):
        long = {i: ids for i, ids in prompts.items() if i not in short}
        yield from decode_with_generate(model, long, max_new_tokens, stop_ids, batch_size=1, **options)


class _SampleTokens(LogitsProcessor):
    """Makes `generate` take the tokens that `sample` gives, and writes them to the sequences of the batch."""

    def __init__(self, batch: list[GeneratedSequence], temperature: float, stop: int, write: Callable):
        self.batch = batch
        self.temperature = temperature
        self.stop = stop
        self.write = write

    def __call__(self, input_ids, scores):
        tokens, log_probs = sample(scores, self.temperature, [(sequence, 0) for sequence in self.batch])
        for sequence, token, log_prob in zip(self.batch, tokens, log_probs):
            if not sequence.finish_reason:
                self.write(sequence, token, log_prob)
        # One that computed NaN would go on to the length limit
        tokens = [self.stop if s.finish_reason else token for s, token in zip(self.batch, tokens)]
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _StopWhenAsked(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]):
        self.should_stop = should_stop

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), bool(self.should_stop()), device=input_ids.device)
