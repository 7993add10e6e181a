"""The command line: bounds, defaults in --help, refusals that echo no text of a patient."""

import argparse
import dataclasses

import pytest

from sft.cli import InputError
from sft.options import (
    EvaluationConfig,
    InferenceConfig,
    ReportConfig,
    TrainConfig,
    check_config,
    given_names,
    number,
    parse_options,
    quantization_of,
)

CONFIGS = [ReportConfig, TrainConfig, InferenceConfig, EvaluationConfig]


def parse(*arguments, config=TrainConfig):
    return parse_options(config, "Test.", list(arguments))


@pytest.mark.parametrize("config", CONFIGS)
def test_without_arguments_the_defaults(config):
    assert parse(config=config) == config()


def test_values_take_the_types_of_their_fields():
    config = parse("--batch_size", "3", "--learning_rate=1e-3", "--target_modules", "a", "b", "--use_4bit")
    assert (config.batch_size, config.learning_rate) == (3, 1e-3)
    assert config.target_modules == ["a", "b"]
    assert config.use_4bit


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    config = parse("--model_path=~/a", "--merge_to=~/b", "--clinical_note=~/5 kg", config=InferenceConfig)
    assert (config.model_path, config.merge_to) == ("/somewhere/a", "/somewhere/b")
    assert config.clinical_note == "~/5 kg"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--no_such_option"], "unrecognized arguments: --no_such_option"),
        (["--batch_siz", "3"], "--batch_siz"),
        (["--batch_size", "0"], "batch_size.*at least 1"),
        (["--batch_size", "2.5"], "not an integer"),
        (["--learning_rate", "fast"], "not a number"),
        (["--learning_rate", "inf"], "out of range"),
        (["--learning_rate", "nan"], "out of range"),
        (["--learning_rate", "0"], "above 0"),
        (["--lora_dropout", "1"], "between 0 and 0.99"),
        (["--seed", "9" * 30], "between 0 and 4294967295"),
        (["--lr_scheduler", "steep"], "lr_scheduler"),
        (["--instruction", " "], "--instruction is empty"),
        (["--instruction", "caf\udce9"], "--instruction is not UTF-8"),
        (["--note_column", "caf\udce9"], "--note_column is not UTF-8"),
    ],
)
def test_bad_values_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        parse(*arguments)


def test_words_outside_an_option_may_be_a_note_and_are_not_shown():
    with pytest.raises(InputError, match="2 words outside any option") as error:
        parse("--clinical_note", "Patient", "John", "Smith", config=InferenceConfig)
    assert "John" not in str(error.value)
    assert "put quotes around" in error.value.fix
    with pytest.raises(InputError, match="unrecognized arguments: --bach_size") as error:
        parse("--clinical_note", "Patient", "John", "--bach_size=3", config=InferenceConfig)
    assert "John" not in str(error.value)
    with pytest.raises(InputError, match=r"--clinical_note=-VALUE"):
        parse("--clinical_note", "-Fever", config=InferenceConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_help_shows_every_default_as_it_is_typed(config, capsys):
    with pytest.raises(SystemExit):
        parse("--help", config=config)
    shown = capsys.readouterr().out
    assert shown.count("options:") == 1
    descriptions = shown.partition("options:")[2].split("\n  --")[1:]
    described = {words.split()[0]: " ".join(words.split()) for words in descriptions}
    for field in dataclasses.fields(config):
        value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        typed = " ".join(value) if isinstance(value, list) else value
        typed = {False: "off"}.get(typed, typed) if isinstance(value, bool) else typed
        assert "(default: " in described[field.name], field.name
        if value is not None:
            assert f"(default: {typed})" in described[field.name], field.name


def test_bounds():
    assert number(int, 1)("1") == 1
    assert number(float, 0, above_low=True)("1e-9") == 1e-9
    for kind, low, text in ((int, 1, "0"), (float, 0, "-1"), (float, 0, "1e999"), (int, 0, "x")):
        with pytest.raises(argparse.ArgumentTypeError):
            number(kind, low)(text)


def test_quantization():
    for typed, expected in (
        ({}, None),
        ({"quantization": "none"}, None),
        ({"use_8bit": True}, "8bit"),
        ({"use_4bit": True, "quantization": "4bit"}, "4bit"),
        ({"quantization": "8bit"}, "8bit"),
    ):
        assert quantization_of(typed) == expected
    for contradiction in ({"use_8bit": True, "use_4bit": True}, {"use_4bit": True, "quantization": "none"}):
        with pytest.raises(InputError, match="contradict each other\nchoose one"):
            quantization_of(contradiction)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"batch_size": 0}, "batch_size: .*at least 1"),
        ({"batch_size": 2.5}, "batch_size is of type float"),
        ({"batch_size": True}, "batch_size is of type bool"),
        ({"learning_rate": "fast"}, "learning_rate is of type str"),
        ({"learning_rate": float("nan")}, "learning_rate.*out of range"),
        ({"lr_scheduler": "steep"}, "lr_scheduler is none of its choices"),
        ({"target_modules": "q_proj"}, "target_modules is of type str"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ("q_proj",)}, "target_modules is of type tuple"),
        ({"target_modules": ["q_proj", 3]}, "target_modules is of type list of other things"),
        ({"output_dir": None}, "output_dir is of type NoneType"),
        ({"val_csv": 3}, "val_csv is of type int"),
        ({"use_4bit": "yes"}, "use_4bit is of type str"),
    ],
)
def test_values_from_python_are_checked_as_those_of_the_command_line(values, words):
    with pytest.raises(InputError, match=words):
        check_config(TrainConfig(**values))


def test_configurations_from_python_that_are_right():
    for config in CONFIGS:
        check_config(config())
    check_config(TrainConfig(learning_rate=1, max_tokens_per_batch=None, train_csv="a.csv", lora_alpha=8))
    config = TrainConfig()
    config.batchsize = 3
    with pytest.raises(InputError, match="unknown options: batchsize"):
        check_config(config)


@pytest.mark.parametrize("typed", [["q_proj,v_proj"], ["q_proj,", "v_proj"], ["q_proj, v_proj"], [","]])
def test_lists_are_separated_by_spaces(typed):
    lists = [(TrainConfig, "target_modules"), (InferenceConfig, "keep_columns"), (ReportConfig, "train_csv")]
    for config, name in lists:
        with pytest.raises(InputError, match=f"--{name}: names are separated by spaces"):
            parse(
                f"--{name}",
                *typed,
                "--input_file=a.csv" if name == "keep_columns" else "--seed=1",
                config=config,
            )
        values = {name: typed}
        with pytest.raises(InputError, match=f"{name}: names are separated by spaces"):
            check_config(config(**values))


def test_a_file_with_a_comma_in_its_name_is_taken(tmp_path):
    file = tmp_path / "notes, old.csv"
    file.touch()
    assert parse("--train_csv", str(file), config=ReportConfig).train_csv == [str(file)]


NOTES = [
    'Patient\'s Zebra fever, "denies" cough.',
    "Zebra Smith",
    "Zebra: BP 120/80\n- cough",
    "Zebra 发热。",
    "Zebra " * 999,
]


@pytest.mark.parametrize(
    "config, name", [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]
)
def test_a_note_in_the_wrong_option_is_refused_and_not_shown(config, name, monkeypatch, tmp_path, csv_files):
    """From its declaration: options that come later too. Columns and texts may have spaces: there the whole
    script runs, up to its first refusal."""
    import sft_dataset
    import sft_inference

    monkeypatch.chdir(tmp_path)
    (field,) = [field for field in dataclasses.fields(config) if field.name == name]
    takes_words = field.metadata["argparse"].get("metavar") in ("NAME", "TEXT", "A=B,...")
    for note in NOTES:
        for typed in ([f"--{name}", note], [f"--{name}={note}"]):
            if not takes_words:
                with pytest.raises(InputError) as refused:
                    parse(*typed, config=config)
            # The evaluation asks for an adapter first: see test_evaluation.py
            elif name.endswith(("_column", "_columns", "_map")) and config is not EvaluationConfig:
                script = sft_inference if config is InferenceConfig else sft_dataset
                files = ["--input_file" if config is InferenceConfig else "--train_csv", str(csv_files[0])]
                monkeypatch.setattr("sys.argv", ["x.py", *files, *typed])
                with pytest.raises(InputError) as refused:
                    script.main()
            else:
                continue
            assert "Zebra" not in str(refused.value)


@pytest.mark.parametrize(
    "path", ["./My run", "runs/My run", "{tmp}/My data/run 1", "{tmp}/ünï (1)", "C:\\runs\\out_1"]
)
def test_paths_with_spaces_are_paths(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    path = path.format(tmp=tmp_path)
    assert parse("--output_dir", path).output_dir == path
    (tmp_path / "A folder of models").mkdir()
    assert parse("--model_name", "A folder of models").model_name == "A folder of models"


def test_options_without_effect_are_refused_or_said(capsys):
    for name in ("id_column", "note_column", "keep_columns"):
        with pytest.raises(InputError, match=f"--{name} has no effect without --input_file"):
            parse("--clinical_note=Fever.", f"--{name}=a", config=InferenceConfig)
    with pytest.raises(InputError, match="--fail_on_error has no effect"):
        parse("--clinical_note=Fever.", "--fail_on_error", config=InferenceConfig)
    parse("--input_file=a.csv", "--note_column=a", "--batch_size=3", config=InferenceConfig)
    assert capsys.readouterr().err == ""
    parse("--clinical_note=Fever.", "--seed=3", "--batch_size=3", config=InferenceConfig)
    said = capsys.readouterr().err
    assert "--seed has no effect without --temperature" in said and "--batch_size has no effect" in said


def test_what_was_typed_is_known_of_the_own_command_line_alone(monkeypatch):
    config = parse("--seed", "42", "--instruction=--lora_r", "--model_name=a/b")
    assert config.given == {"seed", "instruction", "model_name"}
    assert given_names(config) == config.given
    check_config(config)
    # Of another program that has options of these names
    monkeypatch.setattr("sys.argv", ["sweep.py", "--seed", "42", "--num_epochs=9"])
    assert given_names(TrainConfig(lora_r=8)) == {"lora_r"}


def test_a_list_is_given_once():
    for config, name in ((TrainConfig, "train_csv"), (InferenceConfig, "input_file")):
        for words in ((f"--{name}", "a.csv"), (f"--{name}=a.csv",)):
            with pytest.raises(InputError, match=f"--{name} is given 2 times\ngive it once"):
                parse(*words, f"--{name}", "b.csv", config=config)
    assert parse("--seed", "1", "--seed", "2").seed == 2
