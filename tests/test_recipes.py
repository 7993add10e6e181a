"""Presets, repeated runs, runs that start from an adapter."""

import copy
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from conftest import assert_same_run, stats_of
from huggingface_hub.errors import LocalEntryNotFoundError
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import CHAT_TEMPLATES, tiny_tokenizer, write_csv

from sft.cli import InputError
from sft.data.dataset import load_datasets, read_data
from sft.files import write_checksums
from sft.model.base import load_tokenizer
from sft.options import BUNDLED_VALIDATION_FILE, parse_options
from sft.training.recipes import FROM_DATA, PRESETS, resolve
from sft.training.set_up import set_up
from stage_a_sft_training import TrainConfig, train

# What a short run gives, as their defaults: not given
NOT_GIVEN = {"num_epochs": 2, "learning_rate": 2e-4, "max_length": 512}


# ------------------------------------------------------------------------------- presets


def test_documents_are_the_defaults_and_what_is_given_wins(monkeypatch):
    default = TrainConfig()
    assert all(getattr(default, name) == value for name, value in PRESETS["documents"].items())
    assert resolve(default) == default
    quick = PRESETS["quick"]
    assert resolve(TrainConfig(preset="quick")).num_epochs == quick["num_epochs"] == 1
    assert resolve(TrainConfig(preset="quick", num_epochs=5)).num_epochs == 5
    # Also the default, if it was typed
    typed = parse_options(TrainConfig, "", ["--preset=quick", "--num_epochs", "2"])
    config = resolve(typed)
    assert (config.num_epochs, config.learning_rate) == (2, quick["learning_rate"])
    # What is typed for a program that calls training is its own
    monkeypatch.setattr("sys.argv", ["sweep.py", "--num_epochs", "9"])
    assert resolve(TrainConfig(preset="quick")).num_epochs == 1


def test_each_preset_leaves_nothing_of_another(tmp_path):
    file = tmp_path / "sft_config.json"
    for one, other in itertools.permutations(PRESETS, 2):
        recorded = {"preset": one, **PRESETS[one], "max_length": 690}
        file.write_text(json.dumps({"training": recorded}))
        config = resolve(parse_options(TrainConfig, "", [f"--preset={other}", f"--config={file}"]))
        assert {name: getattr(config, name) for name in PRESETS[one]} == PRESETS[other]


def test_a_small_window_is_said_and_no_more_is_advised(configured, model_folder, tmp_path, capfd):
    base = shutil.copytree(model_folder(), tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 128}))
    rows = [(f"r{i}", "Fever and cough since today. " * 40, "Fever.", "factual", "") for i in range(4)]
    options = {
        "preset": "thorough",
        "model_name": str(base),
        "train_csv": str(write_csv(tmp_path / "long.csv", rows)),
    }
    train(configured(dry_run=True, **options, **NOT_GIVEN))
    said = capfd.readouterr().err
    assert (
        "Longest row: 128 tokens, the most that the model takes; 0 % of the training rows fit whole" in said
    )
    assert "4 notes shortened" in said and "(this one: 128)" in said and "would hold" not in said
    rows = [(row[0], row[1], "Fever and cough. " * 40, *row[3:]) for row in rows]
    write_csv(tmp_path / "long.csv", rows)
    with pytest.raises(InputError, match=r"no row fits --max_length 128.*\n.*a model that takes \d+ tokens"):
        train(configured(dry_run=True, **options, **NOT_GIVEN))


@pytest.mark.parametrize("least", [512, 8])
def test_thorough_takes_its_length_from_the_data(configured, monkeypatch, least):
    monkeypatch.setattr("sft.training.set_up.DEFAULT_MAX_LENGTH", least)
    config = resolve(configured(preset="thorough", **NOT_GIVEN))
    run = set_up(config, read_data(config))
    tokenizer = load_tokenizer(Path(config.model_name))
    dataset = load_datasets(read_data(config), tokenizer, configured())[0]
    needed = dataset.lengths.sum(1) + dataset.encoder.n_template_tokens + 1
    share = numpy.ceil(numpy.percentile(needed, 95))
    assert run.config.max_length == (512 if least == 512 else share)
    assert 8 < share < 512
    assert run.sft_config["max_length"] == run.sft_config["training"]["max_length"] == run.config.max_length
    assert run.sft_config["training"]["target_modules"] == ["all-linear"]


# ------------------------------------------------------------------------------- repeating a run


def test_a_run_is_repeated_from_its_configuration(configured, finished, csv_files, capfd, tmp_path):
    """Its folder and --resume are never taken over; other inputs are said."""
    saved = Path(finished().output_dir) / "final_model" / "sft_config.json"
    # Absolute paths are not recorded
    own = {name: getattr(configured(), name) for name in ("train_csv", "val_csv", "model_name", "output_dir")}
    train(TrainConfig(config=str(saved), **own))
    assert "another run" not in capfd.readouterr().err
    # Of its parent, base weights and data
    parent = shutil.copytree(saved.parent, tmp_path / "parent")
    options = {"init_adapter": str(parent), "lora_r": 16, "num_epochs": 1}
    train(configured("child", **options))
    child = str(tmp_path / "child" / "final_model" / "sft_config.json")
    recorded = json.loads(Path(child).read_text())
    recorded["sha256"] |= dict.fromkeys(("val_csv", "base_weights"), "0" * 64)
    Path(child).write_text(json.dumps(recorded))
    adapter = load_file(parent / "adapter_model.safetensors")
    save_file({name: 2 * weight for name, weight in adapter.items()}, parent / "adapter_model.safetensors")
    write_checksums(parent)
    capfd.readouterr()
    train(replace(configured(**options, dry_run=True), config=child))
    assert (
        "child/final_model/sft_config.json (SHA-256 differs: val_csv, base_weights, parent)"
        in capfd.readouterr().err
    )
    assert_same_run(configured(), finished())
    recorded = json.loads((tmp_path / "out" / "final_model" / "sft_config.json").read_text())["training"]
    assert (recorded["config"], recorded["lora_r"]) == ("sft_config.json", 4)

    csv_files[0].write_text(csv_files[0].read_text().replace("Fell from", "Slid from"))
    config = resolve(TrainConfig(config=str(saved), **own, num_epochs=3, val_fraction=0.2))
    assert (config.num_epochs, config.lora_r, config.resume) == (3, 4, False)
    train(replace(configured(dry_run=True), config=str(saved)))
    assert "sft_config.json (SHA-256 differs: train_csv)" in capfd.readouterr().err
    with pytest.raises(InputError, match="no_such"):
        train(TrainConfig(config=str(saved), **{**own, "train_csv": "no_such.csv", "overwrite": True}))


def test_paths_from_python_are_taken_as_text(configured, csv_files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    train(replace(configured(num_epochs=1), output_dir=Path("out"), train_csv=csv_files[0]))
    (tmp_path / "run.yaml").write_text("num_epochs: 3\n")
    assert resolve(TrainConfig(config=Path("run.yaml"))).num_epochs == 3


def test_bundled_notes_of_an_earlier_run_do_not_validate_other_rows(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"val_csv: {BUNDLED_VALIDATION_FILE}\nnum_epochs: 3\n")
    assert resolve(TrainConfig(config=str(file))).val_file == BUNDLED_VALIDATION_FILE
    assert resolve(TrainConfig(config=str(file), train_csv="mine.csv")).val_file is None


def test_options_in_a_yaml_file_are_checked_like_typed_ones(tmp_path):
    file = tmp_path / "run.yaml"

    def read(text: str) -> TrainConfig:
        file.write_text(text)
        return resolve(TrainConfig(config=str(file)))

    config = read(
        "learning_rate: 2e-3\nthinking: on\nsentence_numbering: off\npart_rows: true\nval_csv: null\n"
        "target_modules: [q_proj, k_proj]\nlora_alpha: 8\nseed: 010\npreset: thorough\nnum_epochs: 2\noutput_dir: elsewhere\n"
    )
    assert (config.learning_rate, config.lora_alpha, config.num_epochs, config.seed) == (2e-3, 8, 2, 10)
    assert (config.thinking, config.sentence_numbering, config.part_rows) == ("on", "off", True)
    assert (config.target_modules, config.max_length) == (
        ["q_proj", "k_proj"],
        PRESETS["thorough"]["max_length"],
    )
    assert config.output_dir == TrainConfig().output_dir
    for text, words in (
        ("num_epochs: 0\n", "num_epochs.*at least 1"),
        ("learning_rates: 1\n", "unrecognized arguments: --learning_rates"),
        ("learning_rates:\n", "unrecognized arguments: --learning_rates"),
        ("help:\n", "unrecognized arguments: --help"),
        ("on:\n", "unrecognized arguments: --True"),
        ("num_epochs=3: false\n", r"unrecognized arguments: \(not shown\)"),
        ("training:\n  foo:\n", "unrecognized arguments: --foo"),
        ("- a\n", "not a readable file of options"),
        ("a: [\n", "not a readable file of options"),
        ("training: 5\n", "not a readable file of options"),
        ("seed: 1\nnum_epochs: 2\nseed: 2\n", "not a readable file of options"),
        ("lora_alpha: 1:30\n", "1:30 is not a number"),
        ("num_epochs: [1, 2]\n", "num_epochs: not a value that this option takes"),
        ("target_modules: [[Zebra]]\n", "target_modules: not a value that this option takes"),
        ("Zebra has fever: yes\n", r"unrecognized arguments: \(not shown\)"),
        ("num_epochs: {Zebra: 3}\n", "num_epochs"),
        ("train_csv: Zebra has a fever and coughs\n", "no such file, folder or model"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            read(text)
        assert "Zebra" not in str(refused.value)
    assert read("num_epochs:\npreset: quick\n").num_epochs == PRESETS["quick"]["num_epochs"]


def test_the_hub_is_not_asked_for_what_a_file_names(configured, tmp_path, monkeypatch):
    """As a base model's relative folder that is not there now."""
    asked = []

    def snapshot_download(model_id, local_files_only=False, **options):
        asked.append(None if local_files_only else model_id)
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    file = tmp_path / "sft_config.json"
    file.write_text(json.dumps({"training": {"model_name": "bases/our-hospital"}}))
    own = {name: getattr(configured(), name) for name in ("train_csv", "val_csv", "output_dir")}
    with pytest.raises(InputError, match=r"nor in the local cache[\s\S]*or pass --model_name"):
        train(TrainConfig(config=str(file), **own))
    assert asked == [None]
    with pytest.raises(InputError, match="could not be downloaded"):
        train(TrainConfig(config=str(file), model_name="typed/id", **own))
    assert asked == [None, None, "typed/id"]


# ------------------------------------------------------------------------------- going on from an adapter


def test_training_goes_on_from_an_adapter(configured, finished, capfd, tmp_path):
    """Its LoRA shape and prompt stay; the first validation is its own; it is recorded as the parent."""
    parent = Path(finished().output_dir) / "final_model"
    # The shape is the parent's, as it was not given
    config = configured(init_adapter=str(parent), num_epochs=1, lora_r=16)
    stats = train(config)
    assert stats["untrained_val_loss"] == pytest.approx(
        min(e["val_loss"] for e in stats_of(finished())["epochs"])
    )
    said = capfd.readouterr().err
    assert "Starting Val Loss: " in said and "Untrained" not in said and "LoRA: r=4" in said
    recorded, theirs = (
        json.loads((folder / "sft_config.json").read_text())
        for folder in (tmp_path / "out/final_model", parent)
    )
    assert recorded["sha256"]["parent"] == theirs["sha256"]["adapter"] != recorded["sha256"]["adapter"]
    assert recorded["prompt"] == theirs["prompt"]
    with pytest.raises(InputError, match=r"parent was .*, is None"):
        train(configured(num_epochs=2, resume=True))
    train(configured(init_adapter=str(parent), num_epochs=2, lora_r=16, resume=True))


def test_an_adapter_that_does_not_fit_is_refused(configured, finished, tmp_path):
    parent = Path(finished().output_dir) / "final_model"
    for options, words in (
        ({"lora_r": 8}, r"--lora_r: the adapter in .* was trained with 4"),
        ({"instruction": "Zebra"}, "--instruction: the adapter"),
        ({"lora_r": 16, "architecture": "gemma"}, "trained on another base model"),
        ({"lora_r": 16, "init_adapter": str(tmp_path)}, "no adapter here"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            train(configured(**{"init_adapter": str(parent), **options}))
        assert "Zebra" not in str(refused.value)
    damaged = shutil.copytree(parent, tmp_path / "damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="is damaged or was changed"):
        train(configured(init_adapter=str(damaged), lora_r=16))
    assert not (tmp_path / "out").exists()


def edited(parent: Path, folder: Path, file: str, **values) -> Path:
    """A copy of an adapter folder with other values in a JSON file, and the sums to it."""
    shutil.copytree(parent, folder)
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))
    write_checksums(folder)
    return folder


def test_the_shape_is_the_one_that_inference_loads(configured, finished, tmp_path):
    parent = Path(finished().output_dir) / "final_model"
    scaled = edited(parent, tmp_path / "scaled", "adapter_config.json", lora_alpha=64, use_rslora=True)
    unknown = edited(scaled, tmp_path / "unknown", "sft_config.json", training=None)
    for folder in (scaled, unknown):
        config = resolve(configured(init_adapter=str(folder), lora_r=16))
        assert (config.lora_r, config.lora_alpha, config.use_rslora) == (4, 64, True)
        assert set(config.target_modules) == {"q_proj", "v_proj"}
    for name, value in (
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
    ):
        folder = edited(parent, tmp_path / name, "adapter_config.json", **{name: value})
        with pytest.raises(InputError, match=f"training does not know its {name}"):
            resolve(configured(init_adapter=str(folder), lora_r=16))


def test_layers_are_a_set_and_refusals_name_training_options(configured, finished, tmp_path):
    parent = Path(finished().output_dir) / "final_model"
    given = {"init_adapter": str(parent), "lora_r": 16}
    typed = ["--init_adapter", str(parent), "--target_modules", "v_proj", "q_proj"]
    assert resolve(parse_options(TrainConfig, "", typed)).target_modules == ["q_proj", "v_proj"]
    with pytest.raises(InputError, match="was trained with q_proj, v_proj"):
        resolve(configured(target_modules=["k_proj"], **given))
    (tmp_path / "foreign").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(parent / name, tmp_path / "foreign")
    changed = edited(parent, tmp_path / "changed", "adapter_config.json")
    (changed / "tokenizer.json").write_text("{}")
    for folder in ("nothing", "foreign", "changed"):
        with pytest.raises(InputError, match=f"--init_adapter .*{folder}") as refused:
            resolve(configured(init_adapter=str(tmp_path / folder), lora_r=16))
        assert not {"--model_path", "--prompt_from"} & set(refused.value.fix.replace(";", " ").split())


def test_values_beside_the_adapter_in_a_file_are_given(finished, tmp_path):
    parent = Path(finished().output_dir) / "final_model"
    file = tmp_path / "run.yaml"
    for text, name in (("lora_r: 16\n", "lora_r"), ("instruction: Be brief\n", "instruction")):
        file.write_text(f"init_adapter: {parent}\n{text}")
        with pytest.raises(InputError, match=f"--{name}: the adapter in .* was trained with"):
            resolve(TrainConfig(config=str(file)))
        # Another run's values yield to an adapter that is typed
        file.write_text(text)
        assert resolve(TrainConfig(config=str(file), init_adapter=str(parent))).lora_r == 4


def test_rank_stabilized_lora_is_scaled_by_the_root_of_the_rank(configured):
    for use_rslora, scaling in ((False, 8), (True, 16)):
        config = configured(use_rslora=use_rslora)
        run = set_up(config, read_data(config))
        layer = next(module for module in run.model.modules() if isinstance(module, LoraLayer))
        assert layer.scaling["default"] == scaling


# ------------------------------------------------------------------------------- what stays


def test_the_chat_template_of_a_run_stays(configured, model_folder, tmp_path):
    """On --resume and with --init_adapter: wherever its file is now, or not given; another is refused."""
    shutil.copytree(model_folder(), tmp_path / "base")
    file, other = tmp_path / "mine.jinja", tmp_path / "other.jinja"
    file.write_text(CHAT_TEMPLATES["llama3"])
    other.write_text(CHAT_TEMPLATES["mistral"])
    options = {"model_name": str(tmp_path / "base"), "num_epochs": 1, "save_steps": 1}
    train(configured("reference", chat_template=str(file), **options))

    def kill(run, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(configured(chat_template=str(file), **options), on_step=kill)
    moved = file.rename(tmp_path / "moved.jinja")
    for changed, words in (
        ({"chat_template": str(other)}, "other.jinja: .* was trained with another\nleave it out"),
        ({"thinking": "on"}, "thinking was off, is on"),
    ):
        with pytest.raises(InputError, match=words):
            train(configured(resume=True, **options, **changed))
    train(configured(resume=True, **options))
    assert_same_run(configured(), configured("reference"))

    parent = str(tmp_path / "out" / "final_model")
    for given in ({}, {"chat_template": str(moved)}):
        train(configured("child", init_adapter=parent, overwrite=True, lora_r=16, **options, **given))
        assert (tmp_path / "child/final_model/chat_template.jinja").read_text() == moved.read_text()
    with pytest.raises(InputError, match="was trained with another"):
        train(configured("other", init_adapter=parent, lora_r=16, chat_template=str(other), **options))


def test_one_of_several_chat_templates_where_the_length_comes_from_the_rows(
    configured, model_folder, tmp_path
):
    base = shutil.copytree(model_folder(), tmp_path / "base")
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = {"short": CHAT_TEMPLATES["mistral"], "long": CHAT_TEMPLATES["llama3"]}
    tokenizer.save_pretrained(base)
    config = configured(model_name=str(base), max_length=FROM_DATA, chat_template="short")
    assert "[INST]" in set_up(config, read_data(config)).sft_config["prompt"]["prefix"]


def test_a_run_replaces_nothing_that_it_starts_from(configured, finished):
    """--overwrite removes the earlier run before the first step; an adapter's folder takes no run."""
    out = Path(finished().output_dir)
    final_model = out / "final_model"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for folder, options, words in (
        (out, {"init_adapter": str(final_model)}, "--init_adapter .* belongs to the run in"),
        (out, {"train_csv": f"{out}/checkpoint_epoch_1/rows.csv"}, "--train_csv .* belongs to the run in"),
        (final_model, {}, "--output_dir .* lies in the adapter's folder"),
        (final_model / "new", {}, "--output_dir .* lies in the adapter's folder"),
    ):
        with pytest.raises(InputError, match=rf"{words}[\s\S]*\nchoose another --output_dir"):
            train(configured(str(folder), overwrite=True, **options))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
