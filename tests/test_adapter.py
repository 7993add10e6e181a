"""sft/model/adapter.py: LoRA on a model, the adapter folder, merging."""

import errno
import json
import shutil
from dataclasses import asdict

import pytest
import torch
import transformers
from lora import gradients_of, tiny_examples, with_lora
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import sft.model.adapter as adapter_module
import sft.model.base as base_module
import sft.model.merged as merged_module
from sft.cli import InputError
from sft.data.dataset import packed_batch
from sft.data.prompt import build_template
from sft.files import FORMAT_VERSION, write_checksums
from sft.model.adapter import (
    add_lora,
    load_specialist,
    read_state,
    save_adapter,
    set_gradient_checkpointing,
    unwrap,
)
from sft.model.base import (
    base_config,
    base_weights_sha256,
    load_base_model,
    load_tokenizer,
    pick_device,
    portable_name,
)
from sft.model.folder import read_adapter_folder
from sft.model.kernels import Int8Linear, has_int8
from sft.model.merged import merge, merge_into_int8
from sft.model.probes import enable_packing
from stage_a_sft_training import summed_loss

IDS = torch.tensor([[3, 50, 60, 70, 80, 90]])

# ------------------------------------------------------------------------------- LoRA


def test_gradient_checkpointing_changes_nothing_but_memory():
    results = []
    for on in (False, True):
        model = with_lora(tiny_model())
        enable_packing(model, 512)
        if on:
            set_gradient_checkpointing(model)
        model.train()
        assert unwrap(model).is_activation_checkpointing is on
        loss = summed_loss(model, packed_batch(tiny_examples()))
        loss.backward()
        results.append((loss.item(), gradients_of(model)))
    (plain_loss, plain_gradients), (loss, gradients) = results
    assert loss == plain_loss
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradient, gradients[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_weights_stay_float32(dtype):
    model = add_lora(tiny_model().to(dtype), r=4, alpha=8, dropout=0.0, target_modules=["all-linear"], seed=0)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert enable_packing(model, 512) == (True, "")
    summed_loss(model, packed_batch(tiny_examples()[:2])).backward()
    assert all(gradient.isfinite().all() for gradient in gradients_of(model).values())


def test_llama_2_7b_has_as_many_trainable_parameters_as_the_guide_says():
    llama_2_7b = LlamaConfig()  # its defaults
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_2_7b, dtype=torch.bfloat16)
    model = add_lora(model, r=16, alpha=32, dropout=0.05, target_modules=["q_proj", "v_proj"], seed=0)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 8_388_608
    assert round(100 * trainable / total, 2) == 0.12


def test_target_modules_that_are_not_there():
    with pytest.raises(InputError, match=r"no w_pack[\s\S]*q_proj"):
        add_lora(tiny_model(), r=4, alpha=8, dropout=0.0, target_modules=["w_pack"], seed=0)


def test_a_model_without_q_proj_and_v_proj_gets_the_layers_of_its_architecture(capsys):
    model = with_lora(tiny_model("gpt2"))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}
    assert adapted
    assert all(name.endswith("c_attn") for name in adapted)
    assert "no q_proj and v_proj: LoRA on c_attn" in capsys.readouterr().err


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"]])
def test_layers_whose_weights_are_read_beside_them_get_no_adapter(targets):
    config = transformers.MambaConfig(vocab_size=420, hidden_size=32, num_hidden_layers=1, state_size=8)
    model = with_lora(AutoModelForCausalLM.from_config(config), targets=targets).train()
    model(IDS).logits.sum().backward()
    adapted = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert adapted
    assert all(gradient is not None for gradient in adapted.values())


def test_a_layer_that_returns_more_than_a_product_gets_no_adapter():
    """As the router of Llama 4's experts, which is an nn.Linear by class."""

    class Router(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    base = tiny_model()
    base.model.router = Router(32, 4)
    adapted = [
        name for name, _ in with_lora(base, targets=["all-linear"]).named_parameters() if "lora_" in name
    ]
    assert any("down_proj" in name for name in adapted)
    assert not any("router" in name or "lm_head" in name for name in adapted)


def test_a_mixture_of_experts_with_dropout_says_what_works():
    config = transformers.MixtralConfig(
        **{k: v for k, v in tiny_config("llama").to_dict().items() if k in ("vocab_size", "hidden_size")},
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    options = {"r": 4, "alpha": 8, "target_modules": ["all-linear"], "seed": 0}
    with pytest.raises(InputError, match="no dropout for a mixture of experts\nuse --lora_dropout 0"):
        add_lora(AutoModelForCausalLM.from_config(config), dropout=0.1, **options)
    add_lora(AutoModelForCausalLM.from_config(config), dropout=0.0, **options)


def multimodal_model():
    text_keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    text = tiny_config("llama").to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(
        text_config={key: text[key] for key in text_keys} | {"sliding_window": 24},
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"]])
def test_only_the_text_part_of_a_multimodal_model_gets_an_adapter(targets):
    model = with_lora(multimodal_model(), targets=targets)
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names
    assert not any("vision" in name for name in names)


def test_unwrap_is_the_model_with_its_lora_layers():
    model = tiny_model()
    assert unwrap(model) is model
    assert unwrap(with_lora(model)) is model


# ------------------------------------------------------------------------------- the folder


@pytest.fixture
def adapter(model_folder, tmp_path, monkeypatch):
    """(adapter folder, the model it was saved from), beside its base model as in a repository."""
    base_folder = tmp_path / "models" / "base"
    shutil.copytree(model_folder(), base_folder)
    for module in (base_module, adapter_module):
        monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(module, "BASE_FOLDER", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    model = with_lora(load_base_model(base_folder, torch.device("cpu"), torch.float32))
    tokenizer = load_tokenizer(base_folder)
    sft_config = {
        "format_version": FORMAT_VERSION,
        "max_length": 512,
        "sha256": {"base_weights": base_weights_sha256(base_folder)},
        "base_config": base_config(base_folder),
        "prompt": asdict(build_template(tokenizer)),
    }
    folder = tmp_path / "out" / "final_model"
    save_adapter(folder, model, tokenizer, portable_name(str(base_folder), base_folder), sft_config, "card")
    return folder, model.eval()


def configs_of(folder) -> list[dict]:
    return [json.loads((folder / name).read_text()) for name in ("sft_config.json", "adapter_config.json")]


def load(folder, **options):
    return load_specialist(*read_adapter_folder(folder), pick_device("cpu"), **options)[0]


def test_adapter_folder_is_private_and_portable(adapter):
    folder, _ = adapter
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "sft_config.json",
        "README.md",
        "SHA256SUMS",
    }
    assert folder.stat().st_mode & 0o077 == 0
    assert configs_of(folder)[1]["base_model_name_or_path"] == "models/base"
    assert not any(str(folder.parent.parent) in path.read_text() for path in folder.glob("*.json"))


def test_adapter_folder_is_loaded_here_and_by_peft(adapter):
    folder, model = adapter
    expected = model(IDS).logits
    assert torch.equal(load(folder)(IDS).logits, expected)
    by_peft = AutoPeftModelForCausalLM.from_pretrained("out/final_model").eval()
    assert torch.equal(by_peft(IDS).logits, expected)


def change_weights(change):
    def apply(folder):
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return apply


EXTRA = {"base_model.model.extra.lora_A.weight": torch.ones(2)}


@pytest.mark.parametrize(
    "damage, words",
    [
        (change_weights(lambda w: dict(list(w.items())[1:])), "lacks 1 of the 8"),
        (change_weights(lambda w: {**w, **EXTRA}), "holds 1 others, the first base_model.model.extra"),
        (change_weights(lambda w: {k: torch.zeros_like(v) for k, v in w.items()}), "all weights are zero"),
        (change_weights(lambda w: {k: v * float("nan") for k, v in w.items()}), "NaN"),
        (change_weights(lambda w: {k: v[..., :1].contiguous() for k, v in w.items()}), "shape"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"bad"),
            "not a readable safetens",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (
            lambda folder: shutil.rmtree(folder.parent.parent / "models" / "base"),
            "base model is not available: models/base: not a local folder",
        ),
        (
            lambda folder: tiny_model(seed=9).save_pretrained(folder.parent.parent / "models" / "base"),
            "does not have the weights",
        ),
    ],
)
def test_damaged_adapters_are_refused(adapter, damage, words):
    folder, _ = adapter
    damage(folder)
    write_checksums(folder)
    with pytest.raises(InputError, match=words) as error:
        load(folder)
    assert error.value.fix


def test_a_missing_base_model_can_be_passed_and_a_wrong_id_gets_its_hint(adapter):
    with pytest.raises(InputError, match=r"not available: nowhere: no such folder\npass --base_model with"):
        load(adapter[0], base_model="nowhere")
    with pytest.raises(InputError, match=r"\nuse mistralai/Mistral-7B-v0\.3"):
        load(adapter[0], base_model="mistralai/Mistral-7B")


def test_a_folder_of_a_newer_version_is_refused(adapter):
    folder, _ = adapter
    sft_config = configs_of(folder)[0]
    sft_config["format_version"] = FORMAT_VERSION + 1
    (folder / "sft_config.json").write_text(json.dumps(sft_config))
    with pytest.raises(InputError, match="newer version"):
        read_state(folder)


def test_another_base_model_is_taken_from_the_option(adapter, tmp_path):
    folder, model = adapter
    (tmp_path / "models" / "base").rename(tmp_path / "moved")
    moved = load(folder, base_model=str(tmp_path / "moved"))
    assert torch.equal(moved(IDS).logits, model(IDS).logits)


class FullDisk:
    """A tokenizer that cannot be saved."""

    def save_pretrained(self, folder):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_leaves_what_was_there(adapter):
    folder, model = adapter
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match="disk is full"):
        save_adapter(folder, model, FullDisk(), "x", {"sha256": {}}, "card")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["final_model"]


def test_training_state_is_read_as_it_was_saved(adapter):
    folder, model = adapter
    state = {"step": 3, "tensor": torch.arange(4)}
    save_adapter(folder, model, tiny_tokenizer(), "x", {"sha256": {}}, "card", state)
    found = read_state(folder)
    assert found["step"] == 3
    assert torch.equal(found["tensor"], state["tensor"])
    (folder / "training_state.pt").write_bytes(b"damaged")
    with pytest.raises(InputError, match="its training state cannot be read"):
        read_state(folder)


# ------------------------------------------------------------------------------- merging


@pytest.mark.skipif(not has_int8(), reason="this CPU has no VNNI instructions")
def test_a_model_merged_into_8_bit_is_close_and_cannot_be_saved(adapter):
    folder, model = adapter
    expected = model(IDS).logits
    specialist = load(folder, quantization="int8")
    merged = merge_into_int8(specialist, torch.float32)
    assert any(isinstance(module, Int8Linear) for module in merged.modules())
    assert (merged(IDS).logits - expected).norm() <= 0.05 * expected.norm()
    with pytest.raises(InputError, match=r"cannot be saved or copied\nwrite it with --merge_to"):
        merged.save_pretrained(folder.parent / "merged")


def tied_model(architecture: str, targets):
    """(a tiny model with tied embeddings and LoRA, its logits)."""
    config = tiny_config(architecture)
    config.tie_word_embeddings = True
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    model = with_lora(base, targets=targets).eval()
    with torch.no_grad():
        return model, model(IDS).logits


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2", "gpt2"])
def test_an_adapter_on_a_tied_output_layer_is_merged_into_that_layer_alone(architecture, tmp_path):
    """Merged, written and loaded again, and in 8 bit."""
    targets = ("lm_head", "c_attn" if architecture == "gpt2" else "q_proj")
    model, expected = tied_model(architecture, targets)
    merged, problem = merge(model)
    assert problem == ""
    merged.save_pretrained(tmp_path)
    for found in (merged, AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(found(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    if has_int8() and architecture != "gpt2":
        model, expected = tied_model(architecture, targets)
        rounded = merge_into_int8(model, torch.float32)
        assert (rounded(IDS).logits - expected).norm() <= 0.05 * expected.norm()


def test_a_merge_that_changes_the_logits_is_undone_or_refused(monkeypatch):
    model, expected = tied_model("llama", ("lm_head", "q_proj"))
    monkeypatch.setattr(merged_module, "_untie", lambda model: None)
    kept, problem = merge(model)
    assert kept is model and "its logits differ" in problem
    torch.testing.assert_close(kept(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(merged_module, "replace_linear_layers", lambda base, kind: model.unload())
    with pytest.raises(InputError, match=r"in 8 bit, its logits differ[\s\S]*use --quantization none"):
        merge_into_int8(model, torch.float32)
