"""State saved in one layout and loaded in another: the same numbers, and the same next step."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mtrain.bridge.plan import weight_table
from mtrain.bridge.safetensors_writer import SafetensorsWriter
from mtrain.bridge.save import lookup_in, save_weights
from mtrain.bridge.slices import tensors_by_name
from mtrain.checkpoint.optimizer_state import (
    OptimizerFormat,
    OptimizerTensors,
    load_optimizer_state,
    optimizer_bytes,
    save_optimizer_state,
)
from mtrain.config.optimizer import OptimizerConfig
from mtrain.config.parallel import ParallelConfig
from mtrain.config.tuner import TunerConfig
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.training.optimizer_state import (
    MAIN,
    moment_names,
    optimizer_progress,
    parameter_states,
    restore_progress,
    trained_parameters,
)
from mtrain.training.wrap import gather_parameters, unwrap
from tests.megatron import read_config
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint
from tests.training.rig import CONSTANT, Rig, documents, make_rig, packed

ONE = ParallelLayout()
# A large epsilon keeps Adam from turning rounding noise of tiny gradients into whole steps.
ADAM = dataclasses.replace(CONSTANT, adam_eps=1e-4)
SHARDED = ParallelConfig(use_distributed_optimizer=True)
WHOLE = ParallelConfig(use_distributed_optimizer=False)


def layout_of(**sizes: int) -> ParallelLayout:
    return ParallelLayout(world_size=sizes.pop("world_size", 2), **sizes)


DENSE = {
    "one": (ONE, SHARDED),
    "one, whole": (ONE, WHOLE),
    "dp2": (layout_of(), SHARDED),
    "dp2, whole": (layout_of(), WHOLE),
    "dp3": (layout_of(world_size=3), SHARDED),
    "tp2": (layout_of(tp_size=2), SHARDED),
    "pp2": (layout_of(pp_size=2), WHOLE),
    "pp2 vpp2": (layout_of(pp_size=2, vpp_size=2), SHARDED),
    "tp2 dp2": (layout_of(world_size=4, tp_size=2), SHARDED),
}
EXPERTS = {
    "one": (ONE, SHARDED),
    "dp2": (layout_of(), SHARDED),
    "ep2": (layout_of(ep_size=2), SHARDED),
    "ep2, whole": (layout_of(ep_size=2), WHOLE),
    "etp2": (layout_of(tp_size=2, etp_size=2), SHARDED),
    "ep2 pp2": (layout_of(world_size=4, ep_size=2, pp_size=2), SHARDED),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    names = ("qwen3_tied", "qwen3_moe_mixed", "qwen3_next_moe", "deepseek_v3", "gpt_oss_moe")
    return {name: make_checkpoint(root / name, name) for name in names}


def rig_of(
    state: ParallelState,
    folder: Path,
    parallel: ParallelConfig,
    *,
    optimizer: OptimizerConfig = ADAM,
    dtype: torch.dtype = torch.float32,
    tuner: TunerConfig | None = None,
) -> Rig:
    return make_rig(state, folder, parallel=parallel, optimizer=optimizer, dtype=dtype, tuner=tuner)


def step(rig: Rig, number: int) -> None:
    """One step on the same twelve documents, whatever the number of data-parallel ranks."""
    at, layout = rig.state.coordinates, rig.state.layout
    made = documents(12, seed=number)
    pairs = [made[first : first + 2] for first in range(0, 12, 2)]
    rig.step([packed(pair, length=96) for pair in pairs[at.dp_rank :: layout.dp_size]], number)


def tensors_of(rig: Rig, *, is_sharded: bool) -> OptimizerTensors:
    trained = frozenset(trained_parameters(rig.chunks).values())
    return OptimizerTensors(
        parameters=parameter_states(rig.chunks, rig.optimizer),
        trained=trained,
        kinds=(MAIN, *moment_names(rig.optimizer)),
        only={},
        is_sharded=is_sharded,
    )


def form_of(folder: Path) -> OptimizerFormat:
    table = weight_table(read_config(folder))
    return OptimizerFormat(table=table, max_shard_size=100_000)


def save(rig: Rig, folder: Path, target: Path, *, parallel: ParallelConfig) -> int:
    """Saves the state and the weights; says how many bytes the state was thought to have."""
    if rig.state.is_first_rank:
        target.mkdir()
    dist.barrier()
    tensors = tensors_of(rig, is_sharded=parallel.use_distributed_optimizer)
    pending = save_optimizer_state(
        tensors, target, form=form_of(folder), state=rig.state, open_file=SafetensorsWriter
    )
    gather_parameters(rig.chunks)
    pending.append(
        save_weights(
            lookup_in(tensors_by_name([unwrap(chunk) for chunk in rig.chunks])),
            target,
            table=weight_table(read_config(folder)),
            state=rig.state,
            dtype=rig.chunks[0].config.params_dtype,
            max_shard_size=10**9,
        )
    )
    for write in pending:
        write()
    dist.barrier()
    return optimizer_bytes(tensors, state=rig.state)


def load(rig: Rig, folder: Path, source: Path, *, parallel: ParallelConfig) -> None:
    load_optimizer_state(
        tensors_of(rig, is_sharded=parallel.use_distributed_optimizer),
        source,
        form=form_of(folder),
        state=rig.state,
    )


def start(state: ParallelState, folder: Path, parallel: ParallelConfig, target: Path, **options):
    """Two steps, saved after each."""
    rig = rig_of(state, folder, parallel, **options)
    num_bytes = []
    for number in (1, 2):
        step(rig, number)
        num_bytes.append(save(rig, folder, target / str(number), parallel=parallel))
    return num_bytes[0], optimizer_progress(rig.optimizer)


def go_on(
    state: ParallelState,
    folder: Path,
    parallel: ParallelConfig,
    source: Path,
    target: Path,
    options: dict,
) -> None:
    """Continues from the first step; saves what was loaded, and again after the second step."""
    weights = source / "1"
    config = folder / "config.json"
    if state.is_first_rank and not (weights / "config.json").exists():
        (weights / "config.json").write_bytes(config.read_bytes())
    dist.barrier()
    rig = rig_of(state, weights, parallel, **options)
    load(rig, folder, weights, parallel=parallel)
    progress = optimizer_progress(rig.optimizer)
    assert progress.num_updates == 0, "moments alone do not say how many updates there were"
    restore_progress(rig.optimizer, dataclasses.replace(progress, num_updates=1))
    save(rig, folder, target / "1", parallel=parallel)
    step(rig, 2)
    save(rig, folder, target / "2", parallel=parallel)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        kind = path.name.partition("-")[0].removesuffix(".safetensors")
        found |= {f"{kind}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


STARTED: dict[tuple, tuple[Path, int]] = {}


def started(folder: Path, root: Path, layout: ParallelLayout, parallel: ParallelConfig, **options):
    """The run that others continue, made once for each layout."""
    key = (folder, layout, parallel, *sorted(map(str, options.items())))
    if key not in STARTED:
        target = root / f"started-{len(STARTED)}"
        target.mkdir()
        [(num_bytes, progress), *_] = run_ranks(
            layout, start_with, folder, parallel, target, options
        )
        assert progress.num_updates == (0 if "sgd" in str(options) else 2)
        STARTED[key] = target, num_bytes
    return STARTED[key]


def start_with(state: ParallelState, folder: Path, parallel: ParallelConfig, target: Path, options):
    return start(state, folder, parallel, target, **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("state")


CASES = [
    *(("qwen3_tied", "one", where) for where in DENSE),
    *(("qwen3_tied", where, "one") for where in ("dp3", "tp2 dp2", "pp2 vpp2")),
    ("qwen3_tied", "tp2 dp2", "pp2 vpp2"),
    *(("qwen3_moe_mixed", "one", where) for where in EXPERTS),
    ("qwen3_moe_mixed", "ep2 pp2", "etp2"),
    ("qwen3_next_moe", "dp2", "etp2"),
    ("deepseek_v3", "ep2 pp2", "etp2"),
    ("gpt_oss_moe", "etp2", "dp2"),
]


@pytest.mark.parametrize(("model", "saved_in", "loaded_in"), CASES)
def test_state_loads_in_any_layout_and_the_next_step_is_the_same(
    folders, root, tmp_path, model, saved_in, loaded_in
):
    """T11: what was loaded is bit-equal, the next step equal within 1e-6; T10 in one layout."""
    layouts = DENSE if model == "qwen3_tied" else EXPERTS
    folder = folders[model]
    source, num_bytes = started(folder, root, *layouts[saved_in])
    layout, parallel = layouts[loaded_in]
    run_ranks(layout, go_on, folder, parallel, source, tmp_path, {})
    before, loaded = all_tensors(source / "1"), all_tensors(tmp_path / "1")
    assert before.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], before[name]) for name in before)
    state_bytes = sum(4 * t.numel() for name, t in before.items() if name.startswith("optimizer"))
    assert state_bytes <= num_bytes <= 1.3 * state_bytes
    expected, found = all_tensors(source / "2"), all_tensors(tmp_path / "2")
    for name, tensor in expected.items():
        if (layouts[saved_in]) == (layout, parallel):
            assert torch.equal(found[name], tensor), name
        scale = float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6 * max(scale, 1), msg=name)


OTHER_SETTINGS = {
    "sgd": {"optimizer": dataclasses.replace(CONSTANT, optimizer="sgd", lr=0.1)},
    "bf16": {"dtype": torch.bfloat16},
    "frozen": {"tuner": TunerConfig(freeze_parameters_ratio=0.4)},
}


@pytest.mark.parametrize("how", OTHER_SETTINGS)
def test_other_optimizers_and_precisions_are_saved_too(folders, root, tmp_path, how):
    """T10: the same layout, bit for bit."""
    folder, options = folders["qwen3_tied"], OTHER_SETTINGS[how]
    layout, parallel = DENSE["dp2, whole" if how == "sgd" else "dp2"]
    source, _ = started(folder, root, layout, parallel, **options)
    run_ranks(layout, go_on, folder, parallel, source, tmp_path, options)
    for number in ("1", "2"):
        before, after = all_tensors(source / number), all_tensors(tmp_path / number)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    kinds = {name.partition(":")[0] for name in before}
    moments = {"momentum_buffer"} if how == "sgd" else {"exp_avg", "exp_avg_sq"}
    assert kinds == {"model", "optimizer_param", *(f"optimizer_{kind}" for kind in moments)}


def load_with(state: ParallelState, folder: Path, source: Path, options: dict) -> str:
    rig = rig_of(state, folder, SHARDED, **options)
    with pytest.raises(ValueError) as caught:
        load(rig, folder, source, parallel=SHARDED)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuner": TunerConfig(freeze_parameters_ratio=0.4)}, "that are not trained now: model."),
        ({"optimizer": OTHER_SETTINGS["sgd"]["optimizer"]}, "no safetensors checkpoint"),
    ],
)
def test_the_state_of_other_parameters_is_refused(folders, root, options, message):
    """T14: nothing is filled up with fresh moments."""
    folder = folders["qwen3_tied"]
    source, _ = started(folder, root, *DENSE["one"])
    if "optimizer" in options:
        options = {**options, "dtype": torch.float32}
        [text] = run_ranks(ONE, load_whole, folder, source / "1", options)
    else:
        [text] = run_ranks(ONE, load_with, folder, source / "1", options)
    assert message in text


def load_whole(state: ParallelState, folder: Path, source: Path, options: dict) -> str:
    rig = rig_of(state, folder, WHOLE, **options)
    with pytest.raises(ValueError) as caught:
        load(rig, folder, source, parallel=WHOLE)
    return str(caught.value)
