"""The plan of a run: every row once an epoch, however it is split; its progress; its tracker."""

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import lines_of
from hypothesis import given
from hypothesis import strategies as st

from sft.options import TrainConfig
from sft.training.run import Plan, TrainingProgress, epoch_order
from stage_a_sft_training import train


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=120),
    *(st.integers(1, high) for high in (9, 5, 4)),
    st.none() | st.integers(1, 3000),
    st.booleans(),
)
def test_each_row_once_an_epoch(lengths, batch_size, accumulation, processes, max_tokens, padded):
    """However the rows are split over forward passes and processes; a pass keeps near its tokens."""
    examples = [SimpleNamespace(n_tokens=n, i=i) for i, n in enumerate(lengths)]
    plan = Plan(len(lengths), batch_size, accumulation, processes, 2, 7)
    for epoch in range(2):
        seen = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            rows = [examples[i] for i in plan.rows(step)]
            shares = [
                plan.split_rows(rows, process, batch_size, max_tokens, padded) for process in range(processes)
            ]
            # Every process takes part in every forward pass
            assert len({len(share) for share in shares}) == 1
            batches = [batch for share in shares for batch in share if batch]
            assert all(len(batch) <= batch_size for batch in batches)
            for batch in batches:
                longest = max(example.n_tokens for example in batch)
                size = len(batch) * longest if padded else sum(example.n_tokens for example in batch)
                assert max_tokens is None or len(batch) == 1 or size <= 2 * max_tokens + 2 * longest
            seen += [example.i for batch in batches for example in batch]
        assert sorted(seen) == list(range(len(lengths)))


def test_the_order_is_a_permutation_of_seed_and_epoch_alone():
    for n in (1, 2, 17, 1000):
        assert sorted(epoch_order(n, 3, 0)) == list(range(n))
    orders = [epoch_order(50, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert orders[0] == orders[3]
    assert len(set(orders)) == 3


def test_an_epoch_closes_its_sums():
    progress = TrainingProgress(micro_batch_size=4)
    progress.add({"step": 1, "loss": 2.0, "n_tokens": 100, "n_target_tokens": 30}, 2.0)
    progress.add({"step": 2, "loss": 1.0, "n_tokens": 50, "n_target_tokens": 10}, 1.0)
    epoch = progress.end_epoch("loss", val_loss=1.5)
    assert epoch["train_loss"] == pytest.approx((2.0 * 30 + 1.0 * 10) / 40)
    assert epoch["tokens_per_second"] == pytest.approx(50)
    assert (progress.n_tokens, progress.n_target_tokens, progress.loss_sum, progress.seconds) == (0, 0, 0, 0)
    assert (progress.step, progress.kept_epoch) == (2, 1)


def test_patience_counts_epochs_since_the_best():
    values = [(2.0, 0.1), (1.0, 0.2), (1.5, 0.4), (1.2, 0.3)]
    progress = TrainingProgress()
    progress.epochs = [
        {"epoch": i + 1, "val_loss": loss, "rouge_l": rouge} for i, (loss, rouge) in enumerate(values)
    ]
    for patience, keep_best, is_over in (
        (2, "loss", True),
        (3, "loss", False),
        (0, "loss", False),
        (2, "rouge_l", False),
    ):
        config = TrainConfig(early_stopping_patience=patience, keep_best=keep_best)
        assert progress.out_of_patience(config) is is_over


def tracked(folder: Path) -> dict[tuple[str, int], float]:
    """The numbers in TensorBoard's files of a folder, by name and step."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in folder.rglob("*tfevents*"):
        content = file.read_bytes()
        start = 0
        while start < len(content):
            # A record is its length, a checksum of that, the event, and a checksum of it
            (length,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + length])
            values = [value for value in event.summary.value if value.HasField("simple_value")]
            found |= {(value.tag, event.step): value.simple_value for value in values}
            start += 12 + length + 4
    return found


def test_tensorboard_has_the_numbers_of_metrics_jsonl(configured, tmp_path):
    config = configured(num_epochs=2, report_to="tensorboard")
    train(config)
    expected = {
        (name, line["step"]): pytest.approx(value, rel=1e-6)
        for line in lines_of(config)
        for name, value in line.items()
        if name != "step" and value is not None
    }
    found = tracked(tmp_path / "out")
    assert {name for name, _ in found} >= {"loss", "val_loss", "learning_rate"}
    assert found == expected
