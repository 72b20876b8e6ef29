"""Megatron-Core's own GPT model and its own torch_dist functions, as judges of ours."""

import multiprocessing
import queue

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer

from mtrain.bridge.families import find_family
from mtrain.bridge.load import fill_tensors
from mtrain.bridge.plan import plan_rank, weight_table
from mtrain.bridge.safetensors_folder import open_checkpoint
from mtrain.config import ModelConfig, MoEConfig, ParallelConfig, TrainingConfig
from mtrain.model.build import transformer_config
from tests.megatron import read_config


def stock_model(state, folder, *, named_as_te=False, is_te=False):
    """Megatron-Core's model of a checkpoint on this rank (no virtual stages), unfilled.

    Its own layers all the way: one module an expert, Torch's norms. With these it stores the norm
    before experts as if it were fused, and with Transformer Engine's layers by its own name.
    """
    hf_config = read_config(folder)
    described = find_family(hf_config).megatron_config(hf_config)
    config = transformer_config(
        described,
        state.layout,
        model=ModelConfig(),
        # Torch's norm, which Megatron-Core takes without Transformer Engine, knows no other.
        parallel=ParallelConfig(sequence_parallel=False),
        training=TrainingConfig(),
        moe=MoEConfig(),
        dtype=torch.bfloat16 if is_te else torch.float32,
    )
    config.apply_rope_fusion = is_te
    config.moe_grouped_gemm = is_te
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=is_te, normalization="RMSNorm")
    for layer in spec.layer_specs:
        if named_as_te and layer.submodules.mlp.module is MoELayer:
            # Layers share it.
            layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    tp_size = state.layout.tp_size
    words = -(-described.gpt.vocab_size // tp_size) * tp_size
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=words,
        max_sequence_length=described.gpt.max_position_embeddings,
        pre_process=state.coordinates.pp_rank == 0,
        post_process=state.is_last_stage,
        share_embeddings_and_output_weights=described.gpt.is_tied,
        position_embedding_type="rope",
    )


def expected_tensors(state, folder):
    """What each parameter of the stock model has to be, by the bridge's own plan of this rank."""
    table = weight_table(read_config(folder))
    plan = plan_rank(table, layout=state.layout, rank=state.rank)
    tensors = {p.name: torch.empty(p.shape) for p in plan}
    with open_checkpoint(folder).open() as source:
        fill_tensors([tensors], source, plan)
    result = {}
    for name, tensor in tensors.items():
        if ".mlp.experts." not in name:
            result[name] = tensor
            continue
        before, after = name.split(".mlp.experts.")
        for expert, part in enumerate(tensor):
            result[f"{before}.mlp.experts.local_experts.{expert}.{after}"] = part
    return result


def load_with_megatron(model, folder):
    """Fills a model from a torch_dist folder with Megatron-Core's own loader."""
    loaded = dist_checkpointing.load(model.sharded_state_dict(prefix=""), str(folder))
    # Its loader gives what it found in the common file too.
    own = model.state_dict()
    model.load_state_dict({name: value for name, value in loaded.items() if name in own})


def save_with_megatron(model, folder):
    """Saves a model with Megatron-Core's own writer, which starts processes."""
    multiprocessing.current_process()._config["daemon"] = False
    # It would start a process that imports torch and outlives this one, to pass results on to
    # itself.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(model.sharded_state_dict(prefix=""), str(folder))
