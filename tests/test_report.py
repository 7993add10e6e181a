"""What a run tells people: durations, advice, the loss curve, the model card."""

import pytest
import yaml
from conftest import run_python
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sft.options import TrainConfig
from sft.training.report import advise, draw_losses, duration, model_card
from sft.training.run import TrainingProgress


def epochs_of(*losses) -> list[dict]:
    return [{"epoch": i + 1, "train_loss": train, "val_loss": val} for i, (train, val) in enumerate(losses)]


@pytest.mark.parametrize(
    "seconds, words", [(40, "40 s"), (299, "5 min"), (12_000, "3 h 20 min"), (4_000_000, "1,111 h 7 min")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_advice_follows_the_losses():
    def advice(untrained, *losses, step=6, skipped_steps=0, **options):
        progress = TrainingProgress(
            step=step, untrained_val_loss=untrained, epochs=epochs_of(*losses), skipped_steps=skipped_steps
        )
        return " ".join(advise(TrainConfig(**options), progress))

    assert advice(3.0, (2.5, 2.4), (2.0, 2.1)) == ""
    assert "Overfitting after epoch 1" in advice(3.0, (2.5, 2.4), (2.0, 2.6))
    assert "barely moved" in advice(3.0, (3.0, 2.99))
    assert "lower --learning_rate" in advice(3.0, (4.0, 3.5))
    assert advice(3.0, (3.0, 2.99), step=1) == advice(3.0, (3.0, 3.5), step=1) == ""
    beyond = {"num_epochs": 4, "learning_rate": 1e-2, "lora_r": 64}
    assert advice(3.0, (3.0, 2.99), **beyond).endswith("try --target_modules all-linear")
    assert advice(3.0, (3.0, 2.99), **beyond, target_modules=["all-linear"]).endswith("more rows")
    from_adapter = advice(3.0, (3.0, 2.99), init_adapter="parent")
    assert "barely moved" in from_adapter and "lora_r" not in from_adapter and "modules" not in from_adapter
    assert "--learning_rate" not in advice(3.0, (4.0, 3.5), learning_rate=1e-6)
    assert "1 step skipped" in advice(3.0, (2.0, 2.0), skipped_steps=1)


def test_the_loss_curve_is_a_picture():
    metrics = [{"step": step, "loss": 3.0 / step} for step in range(1, 7)]
    stats = {"untrained_val_loss": 3.0, "kept_epoch": 2, "epochs": epochs_of((2.5, 2.4), (2.0, 2.1))}
    image = draw_losses(metrics, stats, 3)
    assert image.startswith(b"\x89PNG")
    assert len(image) > 10_000


def test_the_environments_drawing_settings_do_not_matter():
    """A notebook's: nothing of matplotlib that is global is used."""
    code = """
import os, sys
sys.path.insert(0, 'tests')
from test_report import epochs_of
from sft.training.report import draw_losses, load_figure
stats = {'untrained_val_loss': 3.0, 'kept_epoch': 1, 'epochs': epochs_of((2.5, 2.4))}
assert draw_losses([{'step': 1, 'loss': 2.0}], stats, 1).startswith(b'\\x89PNG')
assert 'matplotlib.pyplot' not in sys.modules
# One that is installed stays what the program draws with
for name in [name for name in sys.modules if name.partition('.')[0] == 'matplotlib']:
    del sys.modules[name]
os.environ['MPLBACKEND'] = 'svg'
load_figure()
from matplotlib import rcParams
assert rcParams['backend'] == 'svg'
"""
    result = run_python("-c", code, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert result.returncode == 0, result.stderr


def test_the_model_card_holds_losses_and_limits():
    sft_config = {
        "training": {"lora_r": 8, "lora_alpha": 16.0},
        "rows": {"train": {"used": 1200, "hallucinated": 7}},
    }
    card = model_card(sft_config, "some/base", ["q_proj", "v_proj"], 3.0, epochs_of((2.5, 2.4)))
    assert card.startswith("---\nlibrary_name: peft\nbase_model: some/base\n")
    for words in (
        "r=8, alpha=16, on q_proj, v_proj",
        "1,200 factual",
        "7 hallucinated",
        "| 1 | 2.5000 | 2.4000 |",
    ):
        assert words in card
    assert "treat this folder as patient data" in card


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
@example('it\'s "a": {b} #c\n- d')
@example("---\n")
def test_the_cards_front_matter_holds_any_base_name(name):
    sft_config = {
        "training": {"lora_r": 8, "lora_alpha": 16.0},
        "rows": {"train": {"used": 1, "hallucinated": 0}},
        "base_public_name": "some/base",
    }
    card = model_card(sft_config, name, ["q_proj"], 3.0, epochs_of((2.5, 2.4)))
    front = card.removeprefix("---\n").partition("\n---\n\n# Clinical")[0]
    assert yaml.safe_load(front)["base_model"] == name
    assert "(`some/base`)" in card
