import dataclasses
from pathlib import Path

import pytest

from mtrain.config.moe import MoEConfig
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.platform.device import DeviceInfo
from mtrain.training.balance import count_routers
from mtrain.training.batch import count_batches
from mtrain.training.flops import ModelShape, hardware_flops, training_flops
from mtrain.training.metrics import LogRecord, Meter, RunSize
from tests.next_tokens import make_checkpoint_with_next_tokens
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import documents, make_rig, packed

PEAK = 1e9
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(world_size=2),
    ParallelLayout(world_size=2, tp_size=2),
    ParallelLayout(world_size=2, pp_size=2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("metrics") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("metrics") / "moe", "qwen3_moe")


def measured(
    state: ParallelState, folder: Path, num_next_tokens: int = 0
) -> tuple[list[LogRecord], tuple[float, float]]:
    """Two log lines, of two steps and of one, and the FLOPs of a step: useful, computed."""
    rig = make_rig(
        state,
        folder,
        moe=MoEConfig(moe_aux_loss_coeff=(0.01,)),
        num_next_tokens=num_next_tokens,
    )
    shape = ModelShape.from_config(rig.chunks[0].config, vocab_size=131)
    meter = Meter(
        state=state,
        device=DeviceInfo(name="test", peak_flops=PEAK),
        size=RunSize(
            total_steps=10,
            samples_per_epoch=16,
            shape=shape,
            num_routers=count_routers(rig.chunks),
        ),
    )
    made = documents(8)
    units = [packed(made[:4], length=48), packed(made[4:], length=112)]
    # Data-parallel ranks have one each, otherwise a rank has both.
    batches = units[state.coordinates.dp_rank :: state.layout.dp_size]
    records = []
    for step in (1, 2, 3):
        result = rig.step(batches, step)
        meter.add_step(result, count_batches(batches), data_seconds=0.001)
        if step >= 2:
            meter.pause(0.0)
            records.append(meter.record(step))
    counts = count_batches(units)
    work = {
        "num_labels": sum(int((unit.labels != -100).sum()) for unit in units),
        "num_attention_pairs": counts.num_attention_pairs,
    }
    useful = training_flops(shape, num_tokens=counts.num_tokens, **work)
    computed = hardware_flops(shape, num_padded_tokens=counts.num_padded_tokens, **work)
    return records, (useful, computed)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["1", "dp2", "tp2", "pp2"])
def test_every_layout_reports_the_same_training(folder, layout):
    [(expected, (useful, computed))] = run_ranks(LAYOUTS[0], measured, folder)
    ranks = run_ranks(layout, measured, folder)
    for records, _ in ranks:
        assert records == ranks[0][0]
        for record, same in zip(records, expected, strict=True):
            for name in ("step", "total_steps", "epoch", "consumed_samples", "consumed_tokens"):
                assert getattr(record, name) == getattr(same, name)
            for name in ("loss", "token_accuracy", "grad_norm", "learning_rate", "padding_ratio"):
                assert getattr(record, name) == pytest.approx(getattr(same, name), rel=1e-4)
        first, second = records
        num_tokens = sum(len(document.input_ids) for document in documents(8))
        assert first.consumed_samples == 16
        assert second.consumed_samples == 24
        assert second.epoch == 1.5
        assert first.consumed_tokens == 2 * num_tokens
        assert first.padding_ratio == pytest.approx(1 - num_tokens / 160)
        assert second.loss < first.loss
        world_size = layout.world_size
        rate = num_tokens / first.seconds_per_step / world_size
        assert first.tokens_per_second_per_gpu == pytest.approx(rate)
        rate = 160 / first.seconds_per_step / world_size
        assert first.padded_tokens_per_second_per_gpu == pytest.approx(rate)
        gpu_seconds = first.seconds_per_step * world_size
        assert first.tflops_per_gpu == pytest.approx(useful / gpu_seconds / 1e12)
        assert first.mfu == pytest.approx(useful / gpu_seconds / PEAK)
        assert first.hfu == pytest.approx(computed / gpu_seconds / PEAK)
        assert first.hfu > first.mfu
        assert first.eta_seconds == pytest.approx(8 * first.seconds_per_step)
        assert first.data_share == pytest.approx(0.001 / first.seconds_per_step)
        assert first.memory_gib > 0.05
        assert first.load_balancing_loss is None


def test_models_with_experts_report_their_balance(moe_folder):
    [(records, _)] = run_ranks(LAYOUTS[0], measured, moe_folder)
    assert all(record.load_balancing_loss >= 1 for record in records)
    assert "z_loss" not in records[0].as_dict()


@pytest.mark.parametrize("layout", LAYOUTS[2:], ids=["tp2", "pp2"])
def test_multi_token_prediction_reports_its_loss(layout, tmp_path):
    folder, _ = make_checkpoint_with_next_tokens(tmp_path / "model", "mimo")
    [(expected, _)] = run_ranks(LAYOUTS[0], measured, folder, 1)
    # That of a random model, near to that of guessing.
    assert 4 < expected[0].mtp_loss < 8
    for records, _ in run_ranks(layout, measured, folder, 1):
        for record, same in zip(records, expected, strict=True):
            assert record.mtp_loss == pytest.approx(same.mtp_loss, rel=1e-4)


def test_a_line_leaves_out_what_has_no_value():
    names = [field.name for field in dataclasses.fields(LogRecord)]
    record = LogRecord(**dict.fromkeys(names, 1))
    assert list(record.as_dict()) == names
    without = dataclasses.replace(record, mfu=None, hfu=None, grad_norm=None)
    assert set(names) - set(without.as_dict()) == {"mfu", "hfu", "grad_norm"}
