"""What Megatron-Core saves is read by Hugging Face names, in any layout, without its loader."""

import itertools
from pathlib import Path

import pytest
import torch

from mtrain.bridge.plan import weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.checkpoint.torch_dist.folder import open_torch_dist_model
from mtrain.checkpoint.torch_dist.metadata import Chunk, GlobalTensor
from mtrain.checkpoint.torch_dist.reader import find_chunk, open_torch_dist
from mtrain.parallel import ParallelLayout
from mtrain.verify.compare import compare_checkpoints
from tests.checkpoint.torch_dist.stock import expected_tensors, save_with_megatron, stock_model
from tests.megatron import SINGLE, load_model, read_config
from tests.ranks import run_ranks
from tests.test_invariance import layout
from tests.tiny import make_checkpoint

# Of the layouts in which Megatron-Core's own layers run on a CPU.
SAVED = {
    "llama3_tied": layout(tp_size=2, pp_size=2),
    "qwen2": layout(tp_size=2),
    "qwen3": layout(tp_size=2),
    "qwen3_moe": layout(ep_size=2, pp_size=2),
    "qwen3_moe_mixed": layout(ep_size=2),
}


def save_stock(state, source, folder) -> None:
    model = stock_model(state, source)
    expected = expected_tensors(state, source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(expected[name])
    save_with_megatron(model, folder)


@pytest.fixture(scope="module", params=SAVED)
def saved(request, tmp_path_factory):
    """A checkpoint, and the same as Megatron-Core saved it."""
    root = tmp_path_factory.mktemp(request.param)
    source = make_checkpoint(root / "hf", request.param)
    folder = root / "iter_0000007"
    folder.mkdir()
    run_ranks(SAVED[request.param], save_stock, source, folder)
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    return source, root


def test_all_tensors_come_back(saved) -> None:
    source, root = saved
    ours = open_torch_dist_model(root, weight_table(read_config(source)))
    assert ours.folder.name == "iter_0000007"
    verdicts = {c.verdict for c in compare_checkpoints(open_checkpoint(source), ours)}
    assert verdicts == {"equal"}


def parameters_of(state, source, folder):
    table = weight_table(read_config(source))
    weights = open_checkpoint(source) if folder is None else open_torch_dist_model(folder, table)
    chunks = load_model(state, source, weights=weights)
    return [{n: p.detach().clone() for n, p in chunk.named_parameters()} for chunk in chunks]


@pytest.mark.parametrize(
    "sizes",
    [SINGLE, layout(tp_size=2, pp_size=2, vpp_size=2), ParallelLayout(world_size=2, tp_size=2)],
    ids=["one", "tp2_pp2_vpp2", "tp2"],
)
def test_a_model_loads_in_another_layout(saved, sizes) -> None:
    source, root = saved
    expected = run_ranks(sizes, parameters_of, source, None)
    actual = run_ranks(sizes, parameters_of, source, root)
    for ours, theirs in zip(actual, expected, strict=True):
        for chunk, reference in zip(ours, theirs, strict=True):
            assert chunk.keys() == reference.keys()
            assert all(torch.equal(chunk[name], reference[name]) for name in chunk)


def test_what_is_missing_or_too_much_is_named(saved, tmp_path) -> None:
    source, root = saved
    folder = root / "iter_0000007"
    config = read_config(source)
    fewer = weight_table({**config, "num_hidden_layers": 2, "layer_types": None})
    with pytest.raises(ValueError, match=r"wrong shape: |not part of the model: "):
        open_torch_dist(folder, fewer)
    more = weight_table(
        {**config, "num_hidden_layers": 6, "mlp_only_layers": [], "layer_types": None}
    )
    with pytest.raises(ValueError, match=r"wrong shape: |missing: "):
        open_torch_dist(folder, more)


def test_chunks_of_a_box_are_among_those_that_are_found() -> None:
    """In a grid with cells of unequal size, for every box of some steps."""
    cuts = [(0, 1, 2, 3), (0, 5, 6, 9), (0, 4, 8)]
    cells = itertools.product(*(list(itertools.pairwise(cut)) for cut in cuts))
    boxes = [tuple(zip(*cell, strict=True)) for cell in cells]
    chunks = tuple(
        Chunk(starts, tuple(b - a for a, b in zip(starts, stops, strict=True)), Path("x"), 0, 0)
        for starts, stops in boxes
    )
    tensor = GlobalTensor(dtype="F32", shape=(3, 9, 8), chunks=chunks, largest=(1, 5, 4))
    spans = [list(itertools.combinations(range(size + 1), 2)) for size in tensor.shape]
    for box in itertools.product(*spans):
        starts, stops = zip(*box, strict=True)
        inside = {
            chunk
            for chunk, (low, high) in zip(chunks, boxes, strict=True)
            if all(low[axis] < stops[axis] and starts[axis] < high[axis] for axis in range(3))
        }
        assert inside <= set(tensor.chunks_in(starts, stops))
    one = tensor.chunks_in((1, 5, 0), (2, 6, 4))
    assert {chunk.offsets for chunk in one} >= {(1, 5, 0)}
    assert len(one) < len(chunks) / 2


@pytest.mark.parametrize("what", ["list", "other shape", "cut", "empty", "zeros"])
def test_a_chunk_that_is_no_tensor_is_refused_in_one_line(tmp_path, what) -> None:
    """T20."""
    path = tmp_path / "x.distcp"
    entries = {"list": [1], "other shape": torch.ones(5)}
    torch.save(entries.get(what, torch.ones(4)), path)
    content = path.read_bytes()
    content = {"cut": content[:500], "empty": b"", "zeros": bytes(500)}.get(what, content)
    path.write_bytes(content)
    with path.open("rb") as file, pytest.raises(ValueError) as caught:
        find_chunk(Chunk((0,), (4,), path, 0, len(content)), file.fileno(), torch.float32)
    assert str(caught.value).startswith(f"{path}: cannot be read at byte 0: ")
    assert "\n" not in str(caught.value)
