"""sft/model/folder.py and merged.py: what inference loads is what was written; other tools' adapters; merged
folders that other programs prompt as training did."""

import contextlib
import copy
import errno
import json
import pickle
import re
import shutil
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import run_inference
from peft import PeftModel
from tiny import NOTES, encoder_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.cli import InputError
from sft.files import sha256, write_checksums
from sft.model.base import base_config, base_config_problem, load_base_model, weight_files
from sft.model.folder import read_adapter_folder
from sft.model.merged import PROBES, chat_template, chat_template_problem, modelfile
from sft_inference import SFTInference

NOTE = NOTES[0][0]


@pytest.fixture
def folder(adapters, tmp_path):
    """A copy of a trained adapter, to be changed."""
    return shutil.copytree(adapters(), tmp_path / "final_model")


# ------------------------------------------------------------------------------- verified


def test_every_file_that_decides_a_summary_is_verified(folder):
    read_adapter_folder(folder)
    (folder / "README.md").write_text("notes of my own")
    read_adapter_folder(folder)
    files = [path for path in sorted(folder.iterdir()) if path.name not in ("README.md", "SHA256SUMS")]
    assert {"sft_config.json", "tokenizer_config.json", "tokenizer.json"} <= {path.name for path in files}
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        with pytest.raises(InputError, match=rf"{file.name}[\s\S]*section 7 of the guide") as error:
            read_adapter_folder(folder)
        assert str(error.value).count("\n") == 1
        file.write_bytes(content)
    read_adapter_folder(folder)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "chat_templates/a.jinja", "merges.txt", "x.py"])
def test_a_file_that_was_added_is_refused_until_the_sums_are_written_again(folder, name):
    hash_before = read_adapter_folder(folder)[1]["sha256"]["folder"]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(InputError, match=f"{name} is not in SHA256SUMS"):
        read_adapter_folder(folder)
    write_checksums(folder)
    assert read_adapter_folder(folder)[1]["sha256"]["folder"] != hash_before


def test_a_link_to_a_folder_does_not_hide_files(folder, tmp_path):
    (tmp_path / "planted").mkdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path / "planted")
    with pytest.raises(InputError, match="additional_chat_templates is not in SHA256SUMS"):
        read_adapter_folder(folder)


def test_sums_may_be_missing_only_from_an_older_version(folder, capsys):
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match="it has no SHA256SUMS"):
        read_adapter_folder(folder)
    sft_config = json.loads((folder / "sft_config.json").read_text())
    del sft_config["base_config"]
    sft_config["sha256"]["tokenizer"] = sha256(folder / "tokenizer.json")
    (folder / "sft_config.json").write_text(json.dumps(sft_config | {"format_version": 2}))
    SFTInference(folder, device="cpu")
    assert capsys.readouterr().err.count("written by an older version") == 1
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    with pytest.raises(InputError, match=r"tokenizer\.json is not the file that training wrote"):
        read_adapter_folder(folder)


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("config.json", {"rms_norm_eps": 0.5}, "rms_norm_eps"),
        ("config.json", {"hidden_act": "relu"}, "hidden_act"),
        ("config.json", {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_parameters"),
        ("config.json", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("generation_config.json", {"eos_token_id": [2, 9]}, "eos_token_id"),
        ("config.json", {"transformers_version": "9.9.9", "dtype": "float16", "_name_or_path": "x/y"}, ""),
        ("config.json", {"use_cache": False, "architectures": ["Other"]}, ""),
        ("generation_config.json", {"temperature": 0.3, "transformers_version": "9.9.9"}, ""),
    ],
)
def test_the_base_models_configuration(model_folder, tmp_path, file, change, words):
    base = shutil.copytree(model_folder(), tmp_path / "base")
    recorded = base_config(base)
    rewrite(base / file, **change)
    problem = base_config_problem(base, recorded)
    assert words in problem
    assert bool(words) == bool(problem)


def test_names_and_defaults_of_other_versions_do_not_count(model_folder, tmp_path):
    """As an older version wrote it: rope_theta on its own, no keys that later versions added."""
    base = shutil.copytree(model_folder(), tmp_path / "base")
    recorded = base_config(base)
    config = json.loads((base / "config.json").read_text())
    older = {key: value for key, value in config.items() if key not in ("rope_parameters", "pretraining_tp")}
    (base / "config.json").write_text(
        json.dumps(older | {"rope_theta": config["rope_parameters"]["rope_theta"]})
    )
    assert base_config_problem(base, recorded) == ""


def test_a_base_that_was_changed_is_refused_when_the_adapter_is_loaded(folder, model_folder, tmp_path):
    base = shutil.copytree(model_folder(), tmp_path / "base")
    SFTInference(folder, device="cpu", base_model=str(base))
    rewrite(base / "config.json", rms_norm_eps=0.5)
    with pytest.raises(InputError, match=r"is not as in training: config\.json: rms_norm_eps"):
        SFTInference(folder, device="cpu", base_model=str(base))


@pytest.mark.parametrize("named", ["../elsewhere.safetensors", "/x.safetensors", "weights.bin", 5])
def test_an_index_that_leads_elsewhere_is_refused(model_folder, tmp_path, named):
    base = shutil.copytree(model_folder(), tmp_path / "base")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": named}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="not a safetensors file of this folder"):
        weight_files(base)


BROKEN = [
    ("config.json", "[]"),
    ("config.json", "{"),
    ("config.json", "[" * 100_000),
    ("config.json", '{"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}'),
    ("config.json", '{"model_type": "llama", "hidden_size": "many"}'),
    ("generation_config.json", "[]"),
    ("tokenizer.json", "{}"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": [], "merges": 5}}'),
    ("tokenizer_config.json", "[]"),
]


@pytest.mark.parametrize("name, content", BROKEN)
def test_broken_files_are_two_lines(model_folder, tmp_path, name, content):
    from sft.model.base import load_tokenizer

    base = shutil.copytree(model_folder(), tmp_path / "base")
    (base / name).write_text(content)
    with pytest.raises(InputError) as error:
        load_tokenizer(base)
        base_config(base)
        load_base_model(base, torch.device("cpu"), torch.float32)
    assert str(error.value).count("\n") == 1


# ------------------------------------------------------------------------------- not from Python


def test_a_packed_model_is_neither_saved_nor_copied(specialist, tmp_path):
    for attempt in (
        lambda: specialist.model.save_pretrained(tmp_path / "saved"),
        specialist.model.state_dict,
        lambda: copy.deepcopy(specialist.model),
        lambda: pickle.dumps(specialist.model),
        lambda: torch.save(specialist.model, tmp_path / "model.pt"),
    ):
        with pytest.raises(InputError, match=r"cannot be saved or copied\nwrite it with --merge_to"):
            attempt()
    # Refused before a folder is made or the network is tried
    assert not (tmp_path / "saved").exists()
    with pytest.raises(InputError, match="cannot be saved"):
        specialist.model.push_to_hub("someone/model")


# ------------------------------------------------------------------------------- merged


@pytest.mark.parametrize(
    "architecture, chat",
    [("llama", "chatml"), ("qwen2", "llama3"), ("mistral", "mistral"), ("gemma", "none")],
)
def test_a_merged_folder_carries_the_trained_prompt(adapters, tmp_path, architecture, chat, capsys):
    trained = adapters(architecture, chat)
    apart = SFTInference(trained, device="cpu", merge=False)
    expected = apart.generate_batch([NOTE], 20)[0]
    prompts = [apart.prompt_ids(note, 1)[0] for note in (NOTE, *PROBES)]
    logits = apart.model(torch.tensor(prompts[:1])).logits
    capsys.readouterr()
    apart.save_merged(tmp_path / "merged")
    # Where a tokenizer begins with a BOS that the template lacks, so do llama.cpp and Ollama, which is said
    adds_bos = chat == "chatml"
    said = capsys.readouterr().err
    assert ("warning" in said, "llama.cpp and Ollama begin it with <s>" in said) == (adds_bos, adds_bos)

    # By transformers alone
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for note, prompt in zip((NOTE, *PROBES), prompts):
        message = {"role": "user", "content": note}
        assert tokenizer.apply_chat_template([message], return_dict=False) == prompt
    # By Ollama's template around the note
    ollama = (tmp_path / "merged" / "Modelfile").read_text(encoding="utf-8").split('"""')[1]
    for note, prompt in zip((NOTE, *PROBES), prompts):
        before, after = re.sub(r'{{ (".*?") }}', lambda part: json.loads(part[1]), ollama).split(
            "{{ .Prompt }}"
        )
        assert tokenizer(before + note + after).input_ids == [tokenizer.bos_token_id] * adds_bos + prompt
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(torch.tensor(prompts[:1])).logits, logits, rtol=1e-3, atol=1e-3)
    assert sorted(merged.generation_config.eos_token_id) == apart.stop_ids

    # By this toolkit, without the base model
    again = SFTInference(tmp_path / "merged", device="cpu")
    assert again.encoder.control_ids == apart.encoder.control_ids
    found = again.generate_summary(NOTE, 20)
    assert found["generated_summary"] == expected["generated_summary"]
    with pytest.raises(InputError, match="leave out --base_model"):
        SFTInference(tmp_path / "merged", device="cpu", base_model=str(trained))
    unpacked = SFTInference(tmp_path / "merged", device="cpu", merge=False)
    with pytest.raises(InputError, match="merged already"):
        unpacked.save_merged(tmp_path / "twice")
    rewrite(tmp_path / "merged" / "config.json", rms_norm_eps=0.5)
    with pytest.raises(InputError, match=r"config\.json is damaged or was changed"):
        read_adapter_folder(tmp_path / "merged")


def test_where_a_chat_template_cannot_be_the_trained_prompt_it_is_said():
    encoder = encoder_for("llama3", number_sentences=True)

    def problem(prompt, suffix_changes=lambda ids: ids):
        tokenizer = copy.copy(encoder.tokenizer)
        tokenizer.chat_template = chat_template(tokenizer, prompt)
        return chat_template_problem(
            tokenizer, prompt, lambda note: suffix_changes(encoder.prompt(encoder.encode_texts([note])[0]))
        )

    prompt = vars(encoder.template)
    assert "sentences numbered" in problem(prompt)
    assert problem({**prompt, "number_sentences": False}) == ""  # a note whose sentences were numbered first
    joined = problem({**prompt, "number_sentences": False}, lambda ids: ids[:-1])
    assert "joins the note's end" in joined


@pytest.mark.parametrize("text", ["{{ x }}", '"""', "{% raw %}\\n\\", "é 😀 \u2028 \x01", "'#}{#", "a\n"])
def test_a_chat_template_writes_prefix_and_suffix_to_the_letter(specialist, text):
    prompt = {"prefix": text, "suffix": text, "add_special_tokens": False}
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        chat_template(specialist.tokenizer, prompt)
    )
    assert (
        template.render(messages=[{"role": "user", "content": "{{ note }}"}]) == f"{text}{{{{ note }}}}{text}"
    )


def test_the_modelfile_has_prompt_stop_tokens_and_temperature(specialist):
    prompt = vars(specialist.template)
    text = modelfile(specialist.tokenizer, prompt, specialist.stop_ids, 1024)
    assert f'TEMPLATE """{prompt["prefix"]}{{{{ .Prompt }}}}{prompt["suffix"]}"""\n' in text
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0\nPARAMETER num_ctx 1024\n" in text
    quoted = modelfile(specialist.tokenizer, {**prompt, "prefix": 'a "b" {{'}, [4], None)
    assert r'{{ "a \"b\" {{" }}{{ .Prompt }}' in quoted


@pytest.mark.parametrize("value", [5, "Zebra", [1], {"Zebra": [1]}, None, True, -1.5, 10**400])
def test_values_of_other_kinds_are_two_lines(folder, value):
    """Whatever stands in sft_config.json, with sums that fit: a refusal or a summary, never a traceback."""
    file = folder / "sft_config.json"
    values = json.loads(file.read_text())
    for name in values:
        file.write_text(json.dumps(values | {name: value}))
        write_checksums(folder)
        with contextlib.suppress(InputError):
            inference = SFTInference(folder, writing="quote")
            assert inference.generate_summary(NOTE)["generated_summary"]


# ------------------------------------------------------------------------------- other tools


@pytest.fixture
def theirs(folder, model_folder, tmp_path):
    """Our adapter as PEFT saves it after it was trained further."""
    base = AutoModelForCausalLM.from_pretrained(model_folder())
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "dpo")
    return tmp_path / "dpo"


def test_an_adapter_that_peft_saved_takes_the_prompt_of_ours(folder, theirs, tmp_path, capsys):
    with pytest.raises(InputError, match=r"no sft_config\.json[\s\S]*--prompt_from"):
        SFTInference(theirs, device="cpu")
    inference = SFTInference(theirs, device="cpu", prompt_from=folder, merge=False)
    assert f"with the prompt and tokenizer of {folder}" in capsys.readouterr().err
    result = inference.generate_summary(NOTE, 5, seed=3)
    ours = SFTInference(folder, device="cpu").generate_summary(NOTE, 5)
    made_by = result["made_by"]
    assert made_by["adapter"] != ours["made_by"]["adapter"]
    assert made_by["prompt_from"] == f"final_model {ours['made_by']['adapter']}"
    assert ours["made_by"]["prompt_from"] is None
    assert (made_by["seed"], made_by["max_new_tokens"], made_by["dtype"]) == (3, 5, "float32")
    assert result["n_prompt_tokens"] == ours["n_prompt_tokens"]

    # Merging carries the prompt too
    inference.save_merged(tmp_path / "merged")
    merged = SFTInference(tmp_path / "merged", device="cpu").generate_summary(NOTE, 5)
    assert merged["generated_summary"] == result["generated_summary"]
    assert merged["made_by"]["prompt_from"] == made_by["prompt_from"]


def test_an_adapter_on_another_base_needs_its_base_model(folder, theirs, model_folder):
    rewrite(theirs / "adapter_config.json", base_model_name_or_path="someone/other-model")
    with pytest.raises(InputError, match=r"trained on someone/other-model[\s\S]*--base_model"):
        SFTInference(theirs, device="cpu", prompt_from=folder)
    SFTInference(theirs, device="cpu", prompt_from=folder, base_model=str(model_folder()))
    rewrite(theirs / "adapter_config.json", peft_type="IA3")
    with pytest.raises(InputError, match="not a LoRA adapter"):
        SFTInference(theirs, device="cpu", prompt_from=folder)


def test_a_wrong_prompt_from_is_named_and_leads_in_no_circle(folder, theirs, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    for wrong, words in (
        (tmp_path / "nope", "no such folder"),
        (theirs, "no sft_config.json"),
        (folder, "tokenizer"),
    ):
        with pytest.raises(InputError) as refused:
            read_adapter_folder(theirs, wrong)
        problem, _, fix = str(refused.value).partition("\n")
        assert problem.startswith(f"--prompt_from {wrong}: ") and words in problem
        assert (
            "name the final_model folder" in fix and "--model_path" not in fix and "--prompt_from" not in fix
        )


def test_only_what_the_user_typed_is_asked_of_the_hub(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, local_files_only=False, **_):
        asked.append((name, local_files_only))
        raise huggingface_hub.errors.LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    sft_config = json.loads((folder / "sft_config.json").read_text()) | {"base_model_is_local": False}
    (folder / "sft_config.json").write_text(json.dumps(sft_config))
    rewrite(folder / "adapter_config.json", base_model_name_or_path="someone/model")
    write_checksums(folder)
    with pytest.raises(
        InputError, match=r"not available: someone/model[\s\S]*run: hf download someone/model"
    ):
        SFTInference(folder, device="cpu")
    assert asked == [("someone/model", True)]
    with pytest.raises(InputError, match="could not be downloaded"):
        SFTInference(folder, device="cpu", base_model="typed/model")
    assert asked[1:] == [("typed/model", True), ("typed/model", False)]

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full_disk)
    with pytest.raises(InputError, match="typed/model: the disk is full"):
        SFTInference(folder, device="cpu", base_model="typed/model")


def test_merge_to_and_prompt_from_on_the_command_line(folder, theirs, tmp_path):
    merged = tmp_path / "merged"
    result = run_inference("--model_path", theirs, "--prompt_from", folder, "--merge_to", merged)
    assert result.returncode == 0, result.stderr
    assert (merged / "Modelfile").is_file()
    recorded = json.loads((merged / "sft_config.json").read_text())
    assert recorded["sha256"]["adapter"] == sha256(theirs / "adapter_model.safetensors")


def test_sums_cannot_be_removed_by_lowering_the_version(folder):
    sft_config = json.loads((folder / "sft_config.json").read_text())
    sft_config["format_version"] = 2
    (folder / "sft_config.json").write_text(json.dumps(sft_config))
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match="SHA256SUMS"):
        read_adapter_folder(folder)
