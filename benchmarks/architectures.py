"""What the toolkit does with each model family: a tiny random model of its own configuration class is trained
for two steps and used, and compared with plain calls of transformers.

python benchmarks/architectures.py                   # all; or the names of some, as in: Phi3-longrope Mamba

One line each: packed or padded rows, the built-in decoder with its KV cache or transformers' generate, the
largest difference of the untrained loss from plain cross-entropy, of the merged model's logits from those of
the adapter beside its base (relative to the largest), and how many of 8 greedy summaries are the same in a
batch and alone, and as transformers' generate writes them. Takes some minutes; no download."""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import NOTES, tiny_tokenizer, write_csv

SIZES = {
    "vocab_size": 420,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512}
SIZES |= {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 4, "num_local_experts": 4}
STATE = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 8}
STATE |= {"mamba_n_groups": 1}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
DELTA |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
LATENT |= {"first_k_dense_replace": 1}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
LONGROPE = {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 128}}
LONGROPE |= {"original_max_position_embeddings": 128}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 420, "global_head_dim": 8}
NO_HEAD_DIM = {"head_dim": None}

# Name: (class without "Config", what is not as in SIZES)
FAMILIES = {
    "Qwen3": ("Qwen3", {}),
    "Qwen3-MoE": ("Qwen3Moe", MOE),
    "Qwen3-Next": ("Qwen3Next", MOE | DELTA | {"shared_expert_intermediate_size": 16}),
    "Qwen3.5": ("Qwen3_5Text", DELTA),
    "Gemma-3": ("Gemma3Text", SLIDING | {"query_pre_attn_scalar": 8}),
    "Gemma-4": ("Gemma4Text", SLIDING | PER_LAYER),
    "SmolLM3": ("SmolLM3", NO_HEAD_DIM | {"no_rope_layers": [1, 0]}),
    "OLMo-2": ("Olmo2", NO_HEAD_DIM),
    "OLMo-3": ("Olmo3", NO_HEAD_DIM | SLIDING),
    "Granite": ("Granite", NO_HEAD_DIM),
    "Granite-MoE-hybrid": (
        "GraniteMoeHybrid",
        NO_HEAD_DIM | MOE | STATE | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    ),
    "GPT-NeoX": ("GPTNeoX", {}),
    "Falcon": ("Falcon", NO_HEAD_DIM | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Phi-2": ("Phi", {}),
    "Phi-3-longrope": ("Phi3", NO_HEAD_DIM | LONGROPE),
    "OPT": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "MPT": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "GPT-J": ("GPTJ", {"rotary_dim": 4}),
    "GPT-BigCode": ("GPTBigCode", {}),
    "Mixtral": ("Mixtral", MOE),
    "gpt-oss": ("GptOss", MOE | SLIDING),
    "Cohere-2": ("Cohere2", SLIDING),
    "StableLM": ("StableLm", NO_HEAD_DIM),
    "GLM-4": ("Glm4", {}),
    "EXAONE-4": ("Exaone4", SLIDING),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "Falcon-H1": ("FalconH1", STATE | {"mamba_d_ssm": 64}),
    "Bamba": ("Bamba", NO_HEAD_DIM | STATE | {"attn_layer_indices": [1]}),
    "Jamba": ("Jamba", MOE | STATE | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}),
    "Mamba": ("Mamba", {"state_size": 8, "time_step_rank": 4}),
    "DeepSeek-V3": ("DeepseekV3", MOE | LATENT),
    "Llama-4": ("Llama4Text", MOE | {"attention_chunk_size": 64, "intermediate_size_mlp": 64}),
    "StarCoder-2": ("Starcoder2", {"sliding_window": 24}),
    "RecurrentGemma": (
        "RecurrentGemma",
        {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    ),
    "Nemotron": ("Nemotron", {}),
    "Persimmon": ("Persimmon", NO_HEAD_DIM),
}


def make_model(name: str, folder: Path):
    """A random model of the family in `folder`, its weights large enough for outputs to differ."""
    import torch
    import transformers

    kind, other = FAMILIES[name]
    values = {key: value for key, value in (SIZES | other).items() if value is not None}
    config = getattr(transformers, f"{kind}Config")(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            is_decay = any(part in weight_name for part in ("A_log", "dt_proj", "rg_lru"))
            if weight.ndim > 1 and not is_decay:
                is_table = any(part in weight_name for part in ("embed", "wte", "lm_head"))
                weight.normal_(0, 0.5 if is_table else 0.15)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval()


def plain_loss(model, examples) -> float:
    """Cross-entropy per target token, one example at a time, by transformers and torch alone."""
    import torch
    import torch.nn.functional as F

    total = 0.0
    with torch.no_grad():
        for example in examples:
            ids = torch.tensor(example.input_ids)
            logits = model(input_ids=ids[None]).logits[0, example.n_prompt - 1 : -1]
            total += F.cross_entropy(logits.float(), ids[example.n_prompt :], reduction="sum").item()
    return total / sum(example.n_target_tokens for example in examples)


def trained(name: str, folder: Path) -> dict:
    """Two steps of training. Returns what became of it: packed, and the difference in loss."""
    import stage_a_sft_training as training

    model = make_model(name, folder / "base")
    long_note = " ".join(note for note, _ in NOTES)
    pairs = [*NOTES[:7], (long_note, NOTES[7][1])]
    rows = [(f"r{i}", note, summary, "factual", "") for i, (note, summary) in enumerate(pairs)]
    file = str(write_csv(folder / "rows.csv", rows))
    config = training.TrainConfig(
        train_csv=[file],
        val_csv=file,
        model_name=str(folder / "base"),
        output_dir=str(folder / "out"),
        num_epochs=1,
        batch_size=4,
        lora_r=4,
        lora_dropout=0.0,  # PEFT has none for a mixture of experts
        learning_rate=1e-2,
        max_length=480,
        device="cpu",
    )
    seen = []
    stats = training.train(config, on_step=lambda run, _: seen.append(run))
    run = seen[-1]
    expected = plain_loss(model, run.val_set.examples)
    return {
        "rows": "packed" if run.packed else "padded",
        "loss": abs(stats["untrained_val_loss"] - expected) / expected,
    }


def used(folder: Path) -> dict:
    """The adapter merged and beside its base, in a batch, alone, and by transformers' generate."""
    import torch

    from sft.inference.generate import decode_with_generate
    from sft_inference import SFTInference

    notes = [note for note, _ in NOTES[:7]] + [" ".join(note for note, _ in NOTES)]
    beside = SFTInference(folder / "out" / "final_model", device="cpu", merge=False)
    inference = SFTInference(folder / "out" / "final_model", device="cpu")
    prompts = [inference.prompt_ids(note, 12)[0] for note in notes]
    differences = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            one, other = (m.model(input_ids=ids).logits for m in (beside, inference))
        differences.append(((one - other).abs().max() / one.abs().max()).item())
    batch = [result["generated_summary"] for result in inference.generate_batch(notes, 12)]
    alone = [inference.generate_summary(note, 12)["generated_summary"] for note in notes]
    kv_cache = inference._base.config._attn_implementation == "kv_cache"
    inference.decoder = decode_with_generate
    generated = [inference.generate_summary(note, 12)["generated_summary"] for note in notes]
    return {
        "decoder": "KV cache" if kv_cache else "generate",
        "merged": max(differences),
        "batch = alone": sum(map(str.__eq__, batch, alone)),
        "= generate": sum(map(str.__eq__, alone, generated)),
    }


def measure(name: str) -> dict:
    """The line of one family; "why" holds the toolkit's reasons, "failed" the error of one that does not
    work."""
    import transformers

    line = {"family": name}
    if not hasattr(transformers, f"{FAMILIES[name][0]}Config"):
        return line | {"failed": f"transformers {transformers.__version__} does not have it"}
    said = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(said):
            line |= trained(name, Path(folder))
            line |= used(Path(folder))
    except Exception as error:
        line["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    about = ("packed rows", "generate()", "merged", "of their own", "LoRA on")
    return line | {
        "why": {text for text in said.getvalue().splitlines() if any(map(text.__contains__, about))}
    }


COLUMNS = ("family", "rows", "decoder", "loss", "merged", "batch = alone", "= generate", "failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], metavar="FAMILY")
    parser.add_argument("--why", action="store_true", help="also print the toolkit's reasons")
    arguments = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " | seconds |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name in arguments.families or FAMILIES:
        started = time.perf_counter()
        line = measure(name)
        cells = [line.get(column, "") for column in COLUMNS]
        cells = [f"{cell:.1e}" if isinstance(cell, float) else str(cell) for cell in cells]
        print("| " + " | ".join(cells) + f" | {time.perf_counter() - started:.0f} |", flush=True)
        for reason in line.get("why", ()) if arguments.why else ():
            print(f"    {reason}", flush=True)


if __name__ == "__main__":
    main()
