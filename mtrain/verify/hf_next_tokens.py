"""Multi-token prediction of a Hugging Face model, for the precision test.

The one thing to know: transformers' own `MtpModel`, which `generate(use_mtp=True)` drafts with,
loads the layers from the files and runs them: names, order of what is joined and norms are its. It
drafts one token behind a text; what the layers make of all tokens before it, hooks on them see.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import transformers
from transformers import PreTrainedModel

from mtrain.verify.layer_records import recorded
from mtrain.verify.precision import NextTokenOutputs

try:
    from transformers.modeling_layers import MtpModel
except ImportError:
    # Versions before it came.
    MtpModel = None


def missing_class() -> str | None:
    """Why this transformers cannot run multi-token prediction; None if it can."""
    if MtpModel is not None:
        return None
    return f"transformers {transformers.__version__} has no class for it; a newer one has"


def load_next_tokens(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Loads the first layers of multi-token prediction.

    Args:
        model: The model, just loaded from a folder; embedding and head are shared with it.
        num_layers: How many to load.

    Returns:
        An `MtpModel` on the CPU. Weights that are its own are in float32.

    Raises:
        RuntimeError: A weight is missing.
    """
    config = model.config
    config.num_mtp_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        # Only configs with other kinds of attention besides have the list.
        config.mtp_layer_types = ["full_attention"] * num_layers
    model._keys_to_ignore_on_load_unexpected = _patterns(model, num_layers)
    dtype = config.dtype
    # It would round the biases that choose experts too.
    config.dtype = torch.float32
    try:
        return MtpModel.from_pretrained(model)
    finally:
        config.dtype = dtype


def _patterns(model: PreTrainedModel, num_layers: int) -> set[str]:
    """Which tensors are those of multi-token prediction.

    transformers takes the patterns of what a class leaves out. Where these are layers behind the
    last one, it has the numbers of published models only.
    """
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    if not any(re.search(r"layers\\\.\d", pattern) for pattern in patterns):
        return patterns
    first = model.config.num_hidden_layers
    return {rf"^model\.layers\.{first + number}\." for number in range(num_layers)}


@torch.no_grad()
def next_token_outputs(
    next_tokens: PreTrainedModel, input_ids: torch.Tensor, hidden_states: torch.Tensor
) -> NextTokenOutputs:
    """What the layers make of a text.

    Args:
        next_tokens: An `MtpModel`.
        input_ids: int64 [1, seq].
        hidden_states: [1, seq, hidden], what the decoder gave, behind its last norm.
    """
    # The layers begin one token further on. What comes in at the end is of no use, and nothing
    # before it sees it.
    position_ids = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)[None]
    with (
        recorded([layer.mtp_block for layer in next_tokens.layers]) as records,
        _outputs_of(next_tokens) as outputs,
    ):
        # transformers 5.17 asks for a mask, and cannot run a single layer.
        next_tokens(
            input_ids.roll(-1, dims=-1),
            hidden_states,
            attention_mask=torch.ones_like(input_ids),
            position_ids=position_ids,
            mtp_cache=None,
        )
    return NextTokenOutputs(
        hidden_states=records.hidden_states(),
        logits=torch.stack(
            [next_tokens.shared_head(output)[0].float().cpu() for output in outputs]
        ),
        router_margins=records.router_margins(),
    )


@contextmanager
def _outputs_of(next_tokens: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """What the layers give, each behind its last norm, [1, seq, hidden]."""
    outputs: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for layer in next_tokens.layers:
            keep = layer.register_forward_hook(
                lambda _layer, _inputs, output: outputs.append(output)
            )
            hooks.callback(keep.remove)
        yield outputs
