"""Megatron-Core's model of Transformer Engine layers loads what is written here, and vice versa."""

import pytest
import torch

from mtrain.bridge.plan import weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.checkpoint.torch_dist.reader import open_torch_dist
from mtrain.parallel import (
    ParallelLayout,
    destroy_parallel,
    destroy_world,
    initialize_parallel,
    initialize_world,
)
from mtrain.platform.device import has_transformer_engine
from mtrain.verify.compare import compare_checkpoints
from tests.megatron import read_config
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.skipif(
    not has_transformer_engine(), reason="needs a GPU with Transformer Engine"
)


@pytest.fixture(scope="module")
def state():
    yield initialize_parallel(ParallelLayout(), initialize_world())
    destroy_parallel()
    destroy_world()


@pytest.mark.parametrize("name", ["llama3_tied", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe_mixed"])
def test_transformer_engine_layers_load_it_and_what_they_save_is_read(name, state, tmp_path):
    """Experts too: its grouped linears have a weight and a state for each."""
    from tests.checkpoint.torch_dist.stock import (
        load_with_megatron,
        save_with_megatron,
        stock_model,
    )
    from tests.checkpoint.torch_dist.streaming.test_writer import write

    source = make_checkpoint(tmp_path / "hf", name, dtype="bfloat16")
    table = weight_table(read_config(source))
    write(state, source, tmp_path / "ours")
    model = stock_model(state, source, is_te=True).cuda()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_with_megatron(model, tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    save_with_megatron(model, tmp_path / "theirs")
    again = open_torch_dist(tmp_path / "theirs", table)
    verdicts = {c.verdict for c in compare_checkpoints(open_checkpoint(source), again)}
    assert verdicts == {"equal"}
