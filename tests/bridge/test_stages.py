import pytest
import torch

from mtrain.bridge.stages import chunk_layers
from mtrain.parallel import ParallelLayout
from mtrain.platform.device import prepare_megatron

SPREADS = [
    {"num_layers": 8, "pp_size": 1},
    {"num_layers": 8, "pp_size": 4},
    {"num_layers": 12, "pp_size": 2, "vpp_size": 3},
    {"num_layers": 12, "pp_size": 3, "vpp_size": 2},
    {"num_layers": 10, "pp_size": 4, "first": 2, "last": 4},
    {"num_layers": 10, "pp_size": 4, "first": 1},
    {"num_layers": 10, "pp_size": 4, "last": 1},
    {"num_layers": 7, "pp_size": 2, "first": 3, "last": 4},
    {"num_layers": 16, "pp_size": 4, "vpp_size": 2, "first": 2, "last": 6},
    {"num_layers": 14, "pp_size": 4, "vpp_size": 2, "last": 2},
]


def make_layout(*, pp_size, vpp_size=None, first=None, last=None, **_):
    return ParallelLayout(
        world_size=pp_size,
        pp_size=pp_size,
        vpp_size=vpp_size,
        num_layers_in_first_stage=first,
        num_layers_in_last_stage=last,
    )


@pytest.mark.parametrize("spread", SPREADS, ids=str)
def test_layers_are_where_megatron_builds_them(spread):
    prepare_megatron()
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    layout = make_layout(**spread)
    config = TransformerConfig(
        num_layers=spread["num_layers"],
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vpp_size,
        num_layers_in_first_pipeline_stage=layout.num_layers_in_first_stage,
        num_layers_in_last_pipeline_stage=layout.num_layers_in_last_stage,
        pipeline_dtype=torch.float32,
    )
    for pp_rank in range(layout.pp_size):
        chunks = chunk_layers(spread["num_layers"], layout=layout, pp_rank=pp_rank)
        for chunk, layers in enumerate(chunks):
            vp_stage = None if layout.vpp_size is None else chunk
            start = get_transformer_layer_offset(config, vp_stage, pp_rank)
            count = get_num_layers_to_build(config, vp_stage, pp_rank)
            assert layers == range(start, start + count)


@pytest.mark.parametrize("spread", SPREADS, ids=str)
def test_every_layer_is_on_one_stage(spread):
    layout = make_layout(**spread)
    layers = [
        layer
        for pp_rank in range(layout.pp_size)
        for chunk in chunk_layers(spread["num_layers"], layout=layout, pp_rank=pp_rank)
        for layer in chunk
    ]
    assert sorted(layers) == list(range(spread["num_layers"]))


@pytest.mark.parametrize(
    ("spread", "message"),
    [
        ({"num_layers": 7, "pp_size": 2}, "7 layers cannot be spread evenly over 2 pipeline"),
        ({"num_layers": 8, "pp_size": 2, "vpp_size": 3}, "4 layers of a pipeline stage"),
        ({"num_layers": 8, "pp_size": 4, "first": 3}, "3 of them in the first stage"),
        ({"num_layers": 8, "pp_size": 2, "first": 3, "last": 3}, "3 of them in the last stage"),
        ({"num_layers": 2, "pp_size": 2, "first": 3}, "3 of them in the first stage"),
    ],
)
def test_spreads_that_do_not_fit_are_refused(spread, message):
    with pytest.raises(ValueError, match=message):
        chunk_layers(spread["num_layers"], layout=make_layout(**spread), pp_rank=0)
