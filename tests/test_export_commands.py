"""`megatron export` as users run it: every command of the manual, on four ranks, one after another.

The model is a tiny Qwen3-MoE, and the layout that of the manual: TP 2, EP 2, PP 2.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtrain.cli import export, precision
from mtrain.cli.launch import Placement
from mtrain.cli.model_source import ModelSource
from mtrain.cli.parser import parse_config
from mtrain.config import ExportConfig, resolve_export
from tests.lora.peft_folders import load_with_peft, save_with_peft, weights_of
from tests.machine import Done, Machine
from tests.ranks import run_ranks
from tests.test_invariance import layout
from tests.tiny import make_checkpoint

LAYOUT = (
    *("--tensor_model_parallel_size", "2"),
    *("--expert_model_parallel_size", "2"),
    *("--pipeline_model_parallel_size", "2"),
)
PROOF = ("--test_convert_precision", "true")


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    home = tmp_path_factory.mktemp("home")
    # 4 heads of 16: the output projection is a square matrix.
    return Machine(
        home, make_checkpoint(home / "model", "qwen3_moe", head_dim=16, dtype="bfloat16")
    )


@pytest.fixture(scope="module")
def adapter(machine) -> Path:
    """Of PEFT, on attention and on experts, which are then written one by one."""
    folder = machine.home / "adapter-of-peft"
    save_with_peft(
        machine.model,
        folder,
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    single = machine.home / "adapter"
    run_export(
        machine,
        *("--model", str(machine.model), "--adapters", str(folder), "--output_dir", str(single)),
        *("--merge_lora", "false", "--to_hf", "true"),
        num_ranks=1,
    )
    return single


def run_export(machine: Machine, *words: str, num_ranks: int = 4, is_afresh: bool = False) -> Done:
    """Runs the command; fails with what it said."""
    command = machine.megatron_afresh if is_afresh else machine.megatron
    done = command("export", *words, *(LAYOUT if num_ranks > 1 else ()), num_ranks=num_ranks)
    assert done.code == 0, done.stderr
    return done


def report(folder: Path) -> dict:
    return json.loads((folder / "precision.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def assert_equal(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(scope="module")
def mcore(machine) -> Path:
    folder = machine.home / "model-mcore"
    run_export(
        machine,
        *("--model", str(machine.model), "--output_dir", str(folder), "--to_mcore", "true"),
        *PROOF,
    )
    return folder


@pytest.fixture(scope="module")
def back(machine, mcore) -> Path:
    folder = machine.home / "model-hf"
    run_export(
        machine,
        *("--mcore_model", str(mcore), "--output_dir", str(folder), "--to_hf", "true"),
        *PROOF,
    )
    return folder


@pytest.fixture(scope="module")
def mcore_adapter(machine, adapter) -> Path:
    folder = machine.home / "adapter-mcore"
    run_export(
        machine,
        *("--model", str(machine.model), "--adapters", str(adapter), "--output_dir", str(folder)),
        *("--merge_lora", "false", "--to_mcore", "true"),
        *PROOF,
        num_ranks=1,
        is_afresh=True,
    )
    return folder


@pytest.fixture(scope="module")
def adapter_back(machine, mcore_adapter) -> Path:
    folder = machine.home / "adapter-hf"
    run_export(
        machine,
        *("--model", str(machine.model), "--mcore_adapter", str(mcore_adapter)),
        *("--output_dir", str(folder), "--merge_lora", "false", "--to_hf", "true"),
        *PROOF,
    )
    return folder


def test_a_model_goes_to_megatron_and_back_without_a_change(machine, mcore, back) -> None:
    """T24; both halves pass the precision test."""
    assert report(mcore)["passed"]
    assert report(back)["passed"]
    assert {"iter_0000001", "latest_checkpointed_iteration.txt", "args.json", "manifest.json"} <= {
        path.name for path in mcore.iterdir()
    }
    assert_equal(tensors(back), tensors(machine.model))
    model, found = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not any(found.values()), found
    assert model.dtype == torch.bfloat16


def test_an_adapter_goes_to_megatron_and_back_without_a_change(
    machine, adapter, mcore_adapter, adapter_back
) -> None:
    """PEFT loads it with nothing missing or unexpected, and merges it to the same weights."""
    assert report(mcore_adapter)["passed"]
    assert report(adapter_back)["passed"]
    name = "adapter_model.safetensors"
    assert (adapter_back / name).read_bytes() == (adapter / name).read_bytes()
    ours = weights_of(load_with_peft(machine.model, adapter_back).merge_and_unload())
    assert_equal(ours, weights_of(load_with_peft(machine.model, adapter).merge_and_unload()))


def test_merging_needs_no_model_in_megatron(machine, adapter, mcore, mcore_adapter) -> None:
    """Every combination of formats, and what args.json knows needs not be said again."""
    folders = [machine.home / f"merged-{number}" for number in range(3)]
    sources = [
        ("--model", str(machine.model), "--adapters", str(adapter)),
        ("--mcore_model", str(mcore), "--mcore_adapter", str(mcore_adapter)),
        ("--mcore_adapter", str(mcore_adapter)),
    ]
    for number, (folder, words) in enumerate(zip(folders, sources, strict=True)):
        run_export(
            machine,
            *(*words, "--output_dir", str(folder), "--merge_lora", "true", "--to_hf", "true"),
            *(PROOF if number == 0 else ()),
            num_ranks=4 if number == 0 else 1,
        )
    assert report(folders[0])["passed"]
    first = (folders[0] / "model.safetensors").read_bytes()
    for folder in folders[1:]:
        assert (folder / "model.safetensors").read_bytes() == first


def test_verify_says_what_is_equal(machine, mcore, back, adapter_back) -> None:
    def verify(*folders: Path) -> int:
        return machine.megatron("verify", *map(str, folders)).code

    assert verify(mcore) == verify(back) == verify(adapter_back) == 0
    assert verify(mcore, back) == verify(machine.model, mcore) == 0
    damaged = mcore / "iter_0000001" / "__1_0.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    assert verify(mcore) == 1


def swapped_norms(source: ModelSource) -> ModelSource:
    names = [f"model.layers.1.self_attn.{which}_norm.weight" for which in "qk"]
    return with_names(source, {names[0]: names[1], names[1]: names[0]})


def exchanged_experts(source: ModelSource) -> ModelSource:
    names = {}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        one, other = (f"model.layers.2.mlp.experts.{e}.{projection}.weight" for e in (0, 3))
        names |= {one: other, other: one}
    return with_names(source, names)


def transposed_matrix(source: ModelSource) -> ModelSource:
    name = "model.layers.0.self_attn.o_proj.weight"
    assert len(set(source.weights.tensors[name].shape)) == 1
    return dataclasses.replace(source, weights=Faulty(source.weights, {}, transposed=name))


def wrong_rope_base(source: ModelSource) -> ModelSource:
    rope = {**source.hf_config["rope_parameters"], "rope_theta": 500.0}
    return dataclasses.replace(source, hf_config={**source.hf_config, "rope_parameters": rope})


def unnormalised_router(source: ModelSource) -> ModelSource:
    return dataclasses.replace(source, hf_config={**source.hf_config, "norm_topk_prob": False})


def with_names(source: ModelSource, names: dict[str, str]) -> ModelSource:
    return dataclasses.replace(source, weights=Faulty(source.weights, names))


class Faulty:
    """Weights that come under wrong names, or transposed."""

    def __init__(self, weights, names, *, transposed=None) -> None:
        self.weights, self.names, self.transposed = weights, names, transposed
        self.folder, self.tensors = weights.folder, weights.tensors

    @contextlib.contextmanager
    def open(self):
        with self.weights.open() as source:
            self.source = source
            yield self

    def slices(self, name):
        tensor = self.source.slices(self.names.get(name, name))
        return tensor[:].t() if name == self.transposed else tensor


FAULTS = {
    "none": (lambda source: source, None),
    "q and k norms swapped": (swapped_norms, "layer 1"),
    "square matrix transposed": (transposed_matrix, "layer 0"),
    "experts exchanged": (exchanged_experts, "layer 2"),
    "wrong rope base": (wrong_rope_base, "layer 0"),
    "router not normalised": (unnormalised_router, "layer 0"),
}


def export_with_fault(state, words: list[str], fault: str) -> int:
    """The command on a rank that exists already; its model of Megatron-Core has a fault."""
    config = resolve_export(parse_config(ExportConfig, words))
    export.join = lambda *_, **__: state.world
    export.destroy_world = lambda: None
    precision.start_parallel = lambda *_, **__: state
    precision.destroy_parallel = lambda: None
    load = precision.load_model
    precision.load_model = lambda config, source, *rest, **options: load(
        config, FAULTS[fault][0](source), *rest, **options
    )
    return export.run(config, Placement(rank=state.rank, local_rank=state.rank, world_size=4))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_conversion_are_found(machine, tmp_path, fault) -> None:
    """T46: by the exit code, and the first layer that departs is the right one."""
    folder = tmp_path / "mcore"
    words = ["--model", str(machine.model), "--output_dir", str(folder), "--to_mcore", "true"]
    sizes = layout(tp_size=2, ep_size=2, pp_size=2)
    codes = run_ranks(sizes, export_with_fault, [*words, *LAYOUT, *PROOF], fault)
    assert codes == [0 if fault == "none" else 1] * 4
    assert report(folder)["passed"] == (fault == "none")
    assert report(folder)["first_departure"] == FAULTS[fault][1]
