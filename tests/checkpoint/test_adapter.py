import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.safetensors_writer import OpenFile
from mtrain.checkpoint.adapter import AdapterFormat, adapter_contents, export_adapter
from mtrain.checkpoint.folder import Contents, SaveError
from mtrain.lora.peft_format import read_adapter
from mtrain.lora.plan import LoraPlan, adapter_table
from mtrain.lora.weights import adapter_lookup
from mtrain.parallel import ParallelLayout, ParallelState
from mtrain.verify.files import check_files
from tests.adapters import attached
from tests.checkpoint.saving import save as save_steps
from tests.lora.peft_folders import load_with_peft, random_values, table_of, uniform_plan
from tests.ranks import run_ranks
from tests.tiny import make_checkpoint

TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate")
SINGLE = ParallelLayout()
LAYOUTS = {
    "tp2": ParallelLayout(world_size=2, tp_size=2),
    "pp2": ParallelLayout(world_size=2, pp_size=2),
    "ep2": ParallelLayout(world_size=2, ep_size=2),
    "tp2_ep2_etp2": ParallelLayout(world_size=4, tp_size=2, ep_size=2, etp_size=2),
}


class Values(dict):
    """Values of an adapter as a source to load from."""

    def slices(self, name):
        return self[name]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("source"), "qwen3_moe_mixed")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def plan_of(source: Path) -> LoraPlan:
    return uniform_plan(table_of(source), *TARGETS, modules_to_save=("lm_head.weight",))


def form_of(source: Path, *, layout="per_expert", dtype=torch.float32) -> AdapterFormat:
    return AdapterFormat(
        source=source,
        table=table_of(source),
        lora=plan_of(source),
        dtype=dtype,
        base="org/name",
        fingerprint="00",
        layout=layout,
        dropout=0.05,
    )


def save(state: ParallelState, source: Path, run: Path, layout="per_expert", steps=(5,), **options):
    lora = plan_of(source)
    values = Values(random_values(lora, table_of(source)))
    chunks = attached(state, source, lora, values)

    def contents(open_file: OpenFile) -> Contents:
        return adapter_contents(
            adapter_lookup(chunks, dtype=torch.float32),
            form=form_of(source, layout=layout),
            arguments={"lr": 1e-5, "model": "模型"},
            state=state,
            open_file=open_file,
        )

    return save_steps(run, list(steps), contents, world=state.world, **options)[-1].folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=["per_expert", "fused"])
def experts(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory, experts) -> Path:
    return run_ranks(SINGLE, save, source, tmp_path_factory.mktemp("run"), experts)[0]


def test_a_saved_adapter_is_one_file_with_what_belongs_to_it(saved, source):
    assert set(bytes_of(saved)) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "base_model.json",
        "args.json",
        "manifest.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert json.loads((saved / "args.json").read_text()) == {"lr": 1e-5, "model": "模型"}
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"
    assert (saved.parent / "latest_checkpointed_iteration.txt").read_text() == "5\n"


def test_the_manifest_of_an_adapter_lists_what_is_there_and_its_base(saved, source):
    """T21: the parts that ranks wrote are not in it."""
    assert check_files(saved) == []
    manifest = json.loads((saved / "manifest.json").read_text())
    assert set(manifest["files"]) == set(bytes_of(saved)) - {"manifest.json"}
    assert set(manifest["tensors"]) == set(load_file(saved / "adapter_model.safetensors"))
    form = form_of(source)
    assert manifest["source"] == {"model": str(source), "base fingerprint": form.fingerprint}


def test_a_saved_adapter_loads_in_peft_and_here(saved, source):
    load_with_peft(source, saved)
    stored = read_adapter(saved, table_of(source))
    assert stored.lora == plan_of(source)
    values = random_values(stored.lora, table_of(source))
    with stored.open() as tensors:
        assert all(torch.equal(tensors.slices(name)[:], values[name]) for name in values)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_files_do_not_depend_on_the_parallel_layout(saved, source, tmp_path, experts, layout):
    folders = run_ranks(layout, save, source, tmp_path, experts)
    assert bytes_of(folders[0]) == bytes_of(saved)
    assert set(folders) == {tmp_path / "checkpoint-5"}


def test_old_adapters_are_deleted_but_the_one_training_started_from(source, tmp_path):
    start = tmp_path / "checkpoint-1"
    start.mkdir()
    options = {"steps": (2, 3, 4), "limit": 1, "protected": start}
    run_ranks(SINGLE, save_with, source, tmp_path, options)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-1", "checkpoint-4", "latest_checkpointed_iteration.txt"}


def save_with(state: ParallelState, source: Path, run: Path, options: dict) -> Path:
    return save(state, source, run, **options)


def save_on_small_disk(state: ParallelState, source: Path, run: Path, rank: int, limit: int) -> str:
    if state.rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        with pytest.raises(SaveError) as caught:
            save(state, source, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return str(caught.value)


@pytest.mark.parametrize(
    ("rank", "share"), [(1, 0.1), (0, 0.1), (0, 0.9)], ids=["part", "first part", "joined file"]
)
def test_a_full_disk_stops_all_ranks_with_the_reason(source, tmp_path, rank, share):
    """T03: nobody waits, and nothing half-written stays; also when only joining fails."""
    shapes = hf_tensors(adapter_table(table_of(source), plan_of(source)))
    num_bytes = sum(torch.Size(shape).numel() for shape in shapes.values()) * 4
    job = (source, tmp_path, rank, int(share * num_bytes))
    for message in run_ranks(LAYOUTS["pp2"], save_on_small_disk, *job):
        expected = f"cannot save {tmp_path}/checkpoint-5: rank {rank}: [Errno 27]"
        assert message.startswith(expected)
    assert list(tmp_path.iterdir()) == []


def export(state: ParallelState, adapter: Path, source: Path, folder: Path, layout, dtype) -> None:
    stored = read_adapter(adapter, table_of(source))
    export_adapter(
        folder,
        stored,
        form=form_of(source, layout=layout, dtype=dtype),
        arguments={},
        world=state.world,
        exist_ok=False,
    )


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
def test_an_adapter_is_written_anew_in_another_layout_and_dtype(saved, source, tmp_path, layout):
    folder = tmp_path / "exported"
    run_ranks(LAYOUTS["tp2"], export, saved, source, folder, layout, torch.bfloat16)
    load_with_peft(source, folder)
    stored = read_adapter(folder, table_of(source))
    assert stored.dtype == "bfloat16"
    assert bool(stored.fused) == (layout == "fused")
    assert stored.lora == plan_of(source)
    values = random_values(stored.lora, table_of(source))
    with stored.open() as tensors:
        assert all(torch.equal(tensors.slices(n)[:], values[n].bfloat16()) for n in values)


def test_an_adapter_is_never_exported_over_itself(saved, source):
    before = bytes_of(saved)
    with pytest.raises(AssertionError, match="the model was loaded from it"):
        run_ranks(SINGLE, export, saved, source, saved, "fused", torch.bfloat16)
    assert bytes_of(saved) == before
