"""Times a plain megatron-core training step, a floor that `train.py` is compared with.

    python benchmarks/plain_step.py --shape qwen3-0.6b

Megatron-Core's own parts throughout: GPTModel with its layer spec and loss, data-parallel wrapper,
schedule, `finalize_model_grads`, the distributed optimizer with the Adam that it picks; bfloat16
with float32 gradients, nothing overlapped, random weights and words. The first half of the steps is
warm-up, of the rest the median is shown. Of mtrain come the sizes of the model and the process
group. `--spec local` tries the script out on a CPU, with rows instead of packs.
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from shapes import SHAPES

from mtrain.bridge.families import find_family
from mtrain.bridge.family import MegatronConfig
from mtrain.parallel import (
    ParallelLayout,
    destroy_parallel,
    destroy_world,
    initialize_parallel,
    initialize_world,
)
from mtrain.platform.device import has_gpu, has_transformer_engine, prepare_megatron

# Before Megatron-Core is imported; where there is a GPU with Transformer Engine it patches nothing.
prepare_megatron()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

HEADER = "| step | ms/step | tok/s | peak GiB | last loss |"
Fields = dict[str, Any]  # by name: of a configuration, or the arguments of `GPTModel.forward`


def make_config(described: MegatronConfig, spec: str, changes: Fields) -> TransformerConfig:
    """The architecture in bfloat16, with the fusions that Megatron-LM's training turns on.

    Gradient accumulation fusion is not among them: Megatron-Core's output layer needs apex for it.
    """
    precision = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    fusions = {"bias_activation_fusion": True, "bias_dropout_fusion": True}
    fusions["apply_rope_fusion"] = spec == "te"
    fields = described.transformer | {"activation_func": getattr(F, described.activation)}
    return TransformerConfig(**fields | precision | dropout | fusions | changes)


def build_model(
    described: MegatronConfig, config: TransformerConfig, spec: str
) -> DistributedDataParallel:
    """The model with Megatron-Core's own random weights, wrapped for training."""
    norms = {"qk_layernorm": config.qk_layernorm}
    if spec == "te":
        layer = get_gpt_layer_with_transformer_engine_spec(**norms)
    else:
        layer = get_gpt_layer_local_spec(**norms, normalization=config.normalization)
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer,
        vocab_size=described.gpt.vocab_size,
        max_sequence_length=described.gpt.max_position_embeddings,
        share_embeddings_and_output_weights=described.gpt.is_tied,
        position_embedding_type="rope",
        rotary_base=described.gpt.rotary_base,
    )
    config.finalize_model_grads_func = finalize_model_grads
    wrapping = {"grad_reduce_in_fp32": True, "use_distributed_optimizer": True}
    half = Float16Module(config, model.cuda())
    return DistributedDataParallel(config, DistributedDataParallelConfig(**wrapping), half)


def random_batch(vocab_size: int, num_sequences: int, length: int, *, is_packed: bool) -> Fields:
    """Random sequences of equal length: one pack, or rows, as the local spec needs them."""
    device = "cuda" if has_gpu() else "cpu"
    shape = (1, num_sequences * length) if is_packed else (num_sequences, length)
    words = torch.randint(vocab_size, shape, device=device)
    positions = torch.arange(num_sequences * length, device=device) % length
    starts = torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length
    borders = {"cu_seqlens_q": starts, "cu_seqlens_kv": starts}
    longest = {"max_seqlen_q": length, "max_seqlen_kv": length}
    packed = PackedSeqParams(qkv_format="thd", **borders, **longest)
    return {
        "input_ids": words,
        "position_ids": positions.view(shape),
        "attention_mask": None,
        "labels": words.roll(-1, dims=1),
        "packed_seq_params": packed if is_packed else None,
    }


def _forward(batches: Iterator[Fields], model: DistributedDataParallel) -> tuple[Any, Any]:
    return model(**next(batches)), _mean


def _mean(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = losses.float().mean()
    return loss, loss.detach().clone()


def make_step(model: DistributedDataParallel, batch: Fields) -> Callable[[], torch.Tensor]:
    """The training step, as Megatron-LM's loop does it; returns the loss, on the device."""
    fields = {"bf16": True, "params_dtype": torch.bfloat16, "use_distributed_optimizer": True}
    settings = OptimizerConfig(optimizer="adam", lr=1e-5, **fields)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    num_rows, length = batch["input_ids"].shape
    run_schedule = get_forward_backward_func()

    def step() -> torch.Tensor:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        (loss,) = run_schedule(
            forward_step_func=_forward,
            data_iterator=iter([batch]),
            model=[model],
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=num_rows,
        )
        optimizer.step()
        return loss

    return step


def time_steps(step: Callable[[], torch.Tensor], num_steps: int) -> tuple[list[float], float]:
    """Milliseconds of every step and the last loss, without garbage collection as in training.

    The ends of steps are events on the GPU, read after the last one, so nothing waits for them.
    """
    gc.collect()
    gc.disable()
    marks = [_mark()]
    for _ in range(num_steps):
        loss = step()
        marks.append(_mark())
    torch.cuda.synchronize()
    between = torch.cuda.Event.elapsed_time if has_gpu() else lambda start, end: 1e3 * (end - start)
    return [between(start, end) for start, end in itertools.pairwise(marks)], loss.item()


def _mark() -> Any:
    if not has_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def main() -> None:
    """Times one shape and prints its row."""
    parser = argparse.ArgumentParser(description=__doc__)
    dense = [name for name, shape in SHAPES.items() if "num_experts" not in shape]
    parser.add_argument("--shape", choices=dense, default="qwen3-0.6b")
    parser.add_argument("--spec", choices=("te", "local"), default="te")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sequences", type=int, default=8, help="In the batch.")
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a sequence.")
    parser.add_argument("--set", type=json.loads, default={}, help="TransformerConfig, as JSON.")
    arguments = parser.parse_args()
    if arguments.spec == "te" and not has_transformer_engine():
        parser.error("Transformer Engine cannot be used here; try --spec local")
    initialize_parallel(ParallelLayout(), initialize_world())
    described = find_family(SHAPES[arguments.shape]).megatron_config(SHAPES[arguments.shape])
    config = make_config(described, arguments.spec, changes=arguments.set)
    model = build_model(described, config, arguments.spec)
    size = (described.gpt.vocab_size, arguments.sequences, arguments.length)
    batch = random_batch(*size, is_packed=arguments.spec == "te")
    times, last_loss = time_steps(make_step(model, batch), arguments.steps)
    assert math.isfinite(last_loss), f"the loss is {last_loss}; this step trains nothing"
    milliseconds = statistics.median(times[len(times) // 2 :])
    rate = 1000 * arguments.sequences * arguments.length / milliseconds
    peak = torch.cuda.max_memory_reserved() / 2**30 if has_gpu() else 0.0
    name = " ".join([f"plain megatron-core {arguments.shape}", *map(str, arguments.set.items())])
    print(HEADER, "|" + "---|" * HEADER.count(" |"), sep="\n")
    print(f"| {name} | {milliseconds:.1f} | {rate:,.0f} | {peak:.1f} | {last_loss:.4f} |")
    destroy_parallel()
    destroy_world()


if __name__ == "__main__":
    main()
