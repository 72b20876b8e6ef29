"""Buckets and one-member gathering; several members are covered by test_save.py."""

import pytest
import torch

from mtrain.bridge.gather import BlockGatherer, Member, make_buckets
from mtrain.bridge.load import load_weights
from mtrain.bridge.plan import plan_rank, weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.bridge.safetensors_header import tensor_bytes
from mtrain.bridge.save import lookup_in
from mtrain.bridge.slices import tensors_by_name
from mtrain.parallel import ParallelLayout, World
from tests.bridge.standin import make_chunks, random_tensors, write_checkpoint
from tests.tiny import tiny_config

TENSORS = (
    ("a", "F32", (10, 3)),
    ("b", "F32", (4,)),
    ("c", "BF16", (2, 50)),
    ("d", "F32", (3, 1)),
)


@pytest.mark.parametrize("max_bytes", [1, 28, 120, 256, 4000])
def test_buckets_hold_all_rows_in_order_and_stay_small(max_bytes):
    buckets = list(make_buckets(TENSORS, max_bytes=max_bytes))
    rows = [
        (block.name, row)
        for bucket in buckets
        for block in bucket
        for row in range(block.start, block.start + block.shape[0])
    ]
    assert rows == [(name, row) for name, _, shape in TENSORS for row in range(shape[0])]
    for bucket in buckets:
        size = sum(tensor_bytes(block.dtype, block.shape) for block in bucket)
        assert size <= max_bytes or [block.shape[0] for block in bucket] == [1]
    whole = {block.name for bucket in buckets for block in bucket if block.is_whole}
    assert whole == {
        name for name, dtype, shape in TENSORS if tensor_bytes(dtype, shape) <= max_bytes
    }
    assert all(len({block.dtype for block in bucket}) == 1 for bucket in buckets)


@pytest.mark.parametrize("max_bytes", [1, 100, 1000, 10**9])
def test_blocks_of_any_size_put_the_tensors_together_again(tmp_path, max_bytes):
    """T24: blocks that cut through interleaved heads, experts and padding."""
    hf = random_tensors("qwen3_moe_mixed", num_hidden_layers=2)
    write_checkpoint(tmp_path, hf)
    table = weight_table(tiny_config("qwen3_moe_mixed", num_hidden_layers=2))
    layout = ParallelLayout()
    plan = plan_rank(table, layout=layout, rank=0)
    chunks = make_chunks(plan, num_chunks=1, dtype=torch.float32)
    load_weights(chunks, open_checkpoint(tmp_path), table=table, layout=layout, rank=0)
    (tensors,) = tensors_by_name(chunks)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    gatherer = BlockGatherer(
        [Member(rank=0, shard=0, plan=plan)],
        world=World(size=1, rank=0, device=torch.device("cpu"), group=None, timeout_seconds=1),
        lookup=lookup_in([{name: tensor.detach() for name, tensor in tensors.items()}]),
    )
    shapes = tuple((name, "F32", tuple(tensor.shape)) for name, tensor in hf.items())
    flat = torch.cat(
        [gatherer.gather(bucket, writer=0) for bucket in make_buckets(shapes, max_bytes=max_bytes)]
    )
    assert torch.equal(flat, torch.cat([tensor.flatten() for tensor in hf.values()]))
    assert all(torch.equal(tensors[name], before[name]) for name in before)
