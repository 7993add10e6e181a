"""Tiny models with LoRA, and examples to train them on. Shared by the tests of sft/model/."""

import torch
from tiny import NOTES, tiny_tokenizer

from sft.data.dataset import Example, SFTDataset
from sft.data.prompt import PromptEncoder, build_template
from sft.data.rows import Row
from sft.model.adapter import add_lora


def with_lora(model, seed=0, targets=("q_proj", "v_proj")):
    """LoRA whose B is not zero, so that it has an effect and A has a gradient."""
    model = add_lora(model, r=4, alpha=8, dropout=0.0, target_modules=list(targets), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def tiny_examples() -> list[Example]:
    tokenizer = tiny_tokenizer()
    template = build_template(tokenizer, instruction=None, number_sentences=False)
    rows = [Row(i + 2, f"r{i}", note, summary, "factual") for i, (note, summary) in enumerate(NOTES)]
    return SFTDataset(rows, PromptEncoder(tokenizer, template), 512).examples
