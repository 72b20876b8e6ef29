"""Every format keeps the contract of `StoredWeights`, so whoever reads knows none of them."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from mtrain.bridge.converted import converted
from mtrain.bridge.fingerprint import fingerprint
from mtrain.bridge.plan import hf_tensors
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.save import DTYPE_NAMES
from mtrain.bridge.sources import StoredWeights
from mtrain.bridge.storage.view import arranged
from mtrain.checkpoint.torch_dist.reader import open_torch_dist
from mtrain.lora.adapter_weights import adapter_weights
from mtrain.lora.merged_weights import merge_weights
from mtrain.lora.peft_format import read_adapter
from mtrain.lora.plan import adapter_table
from mtrain.parallel import ParallelLayout
from tests.lora.peft_folders import random_values, table_of, uniform_plan, write_adapter
from tests.ranks import run_ranks
from tests.tiny import DISTINCT, make_checkpoint

KINDS = ("checkpoint", "converted", "merged", "adapter", "torch_dist")
LEAVES = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Formats:
    """A model in all formats, and its adapter; each is made when it is first asked for."""

    name: str
    root: object
    made: dict = field(default_factory=dict)

    def __getitem__(self, kind: str) -> StoredWeights:
        if kind not in self.made:
            self.made[kind] = getattr(self, f"_{kind}")()
        return self.made[kind]

    def _checkpoint(self):
        changes = {"num_hidden_layers": 3 if self.name.endswith("mixed") else 2}
        options = {"dtype": "bfloat16", "max_shard_size": "100KB", **changes}
        folder = make_checkpoint(self.root / "hf", self.name, **options)
        return arranged(open_checkpoint(folder), table_of(folder))

    def _converted(self):
        base = self["checkpoint"]
        dtypes = ("F32", "BF16", "F16")
        return converted(base, {name: dtypes[index % 3] for index, name in enumerate(base.tensors)})

    @property
    def _table(self):
        return table_of(self["checkpoint"].folder)

    def _stored(self):
        saved = () if self.name.endswith("tied") else ("lm_head.weight",)
        lora = uniform_plan(self._table, *LEAVES, modules_to_save=saved)
        values = random_values(lora, self._table)
        layout = "fused" if "moe" in self.name else "per_expert"
        folder = write_adapter(self.root / "adapter", lora, self._table, values, layout=layout)
        return read_adapter(folder, self._table)

    def _merged(self):
        return merge_weights(self["checkpoint"], self["stored"])

    def _adapter(self):
        return adapter_weights(self["stored"], adapter_table(self._table, self["stored"].lora))

    def _torch_dist(self):
        # In every other family two ranks share the work.
        world_size = 1 + list(DISTINCT).index(self.name) % 2
        (self.root / "mcore").mkdir()
        run_ranks(
            ParallelLayout(world_size=world_size),
            write_torch_dist,
            self["checkpoint"].folder,
            self.root / "mcore",
        )
        return open_torch_dist(self.root / "mcore", self._table)


def write_torch_dist(state, source, target) -> None:
    from mtrain.checkpoint.torch_dist.streaming.writer import save_torch_dist

    stored = arranged(open_checkpoint(source), table_of(source))
    weights = converted(stored, dict.fromkeys(hf_tensors(table_of(source)), "BF16"))
    save_torch_dist(
        weights,
        target,
        table=table_of(source),
        rank=state.rank,
        world_size=state.layout.world_size,
        iteration=1,
    )


@pytest.fixture(scope="module", params=DISTINCT)
def formats(request, tmp_path_factory) -> Formats:
    return Formats(request.param, tmp_path_factory.mktemp(request.param))


def assert_same(part: torch.Tensor, expected: torch.Tensor, *, kind: str) -> None:
    if kind == "merged":
        # A product of fewer rows may be summed up in another order.
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(part, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_shape_are_known_before_a_tensor_is_read(formats, kind) -> None:
    weights = formats[kind]
    assert weights.folder.is_dir()
    with weights.open() as source:
        for name, tensor in weights.tensors.items():
            whole = source.slices(name)[:]
            assert (DTYPE_NAMES[whole.dtype], whole.shape) == (tensor.dtype, tensor.shape), name


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_those_of_the_whole(formats, kind) -> None:
    weights = formats[kind]
    with weights.open() as source:
        for name, tensor in weights.tensors.items():
            whole = source.slices(name)[:]
            num_rows = tensor.shape[0]
            third = max(1, num_rows // 3)
            for start, stop in ((0, third), (third, num_rows), (num_rows - 1, num_rows)):
                if start < stop:
                    part = source.slices(name)[start:stop]
                    assert_same(part, whole[start:stop], kind=kind)
            if len(tensor.shape) == 2:
                middle = tensor.shape[1] // 2
                part = source.slices(name)[:third, middle : middle + 1]
                assert_same(part, whole[:third, middle : middle + 1], kind=kind)
                assert_same(source.slices(name)[:, :middle], whole[:, :middle], kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_several_threads_may_ask_at_once(formats, kind) -> None:
    weights = formats[kind]
    names = list(weights.tensors)
    with weights.open() as source:
        alone = {name: source.slices(name)[:].clone() for name in names}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with weights.open() as source, ThreadPoolExecutor(4) as threads:
            asked = [*names, *reversed(names)] * 3
            parts = threads.map(lambda name: source.slices(name)[:].clone(), asked)
            wrong = {n for n, p in zip(asked, parts, strict=True) if not torch.equal(p, alone[n])}
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_the_format_does_not_change_the_fingerprint(formats) -> None:
    assert fingerprint(formats["checkpoint"]) == fingerprint(formats["torch_dist"])


def test_the_tensors_of_all_formats_are_those_of_the_model(formats) -> None:
    names = formats["checkpoint"].tensors.keys()
    for kind in ("converted", "merged", "torch_dist"):
        assert formats[kind].tensors.keys() == names
    with formats["checkpoint"].open() as ours, formats["torch_dist"].open() as theirs:
        for name in names:
            assert torch.equal(ours.slices(name)[:], theirs.slices(name)[:]), name
