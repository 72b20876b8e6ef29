"""The two ways to compute a layer, as Megatron-Core layer specs.

`te` takes Transformer Engine's linears, norms and attention; `torch` Megatron-Core's linears with
our norm and attention, and needs no extra package. Both share our experts. Weight names differ in
one thing only: `te` keeps the norm before a column-parallel linear inside it.
"""

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from mtrain.model.attention import PackedAttention, RotarySelfAttention
from mtrain.model.experts import GroupedExperts
from mtrain.model.norm import RMSNorm
from mtrain.model.router import BalancedRouter
from mtrain.platform.device import has_gpu, has_transformer_engine


class TorchProvider(LocalSpecProvider):
    """Megatron-Core's linears, our norm, attention and experts."""

    packed_format = "sbhd"
    self_attention = RotarySelfAttention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Norm of layers, of queries and keys, and of the end."""
        return RMSNorm

    def core_attention(self) -> type:
        """Attention between queries, keys and values."""
        return PackedAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, None]:
        """Experts; they have no submodules to choose."""
        return GroupedExperts, None


class TransformerEngineProvider(TESpecProvider):
    """Transformer Engine's layers with our experts."""

    packed_format = "thd"
    self_attention = SelfAttention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Norms outside of linears.

        Not Transformer Engine's, which takes four times as long to launch (0.55 against 0.14 ms
        forward and backward): with two a layer for queries and keys, small models wait for that.
        """
        return RMSNorm

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, None]:
        """Experts; they have no submodules to choose."""
        return GroupedExperts, None


Provider = TorchProvider | TransformerEngineProvider


def choose_backend(transformer_impl: str) -> str:
    """The backend to build with: "te" or "torch".

    Args:
        transformer_impl: "auto" takes Transformer Engine where it can be used.

    Raises:
        RuntimeError: "te" is asked for where it cannot be used.
    """
    usable = has_transformer_engine()
    if transformer_impl == "te" and not usable:
        reason = (
            "it cannot be imported: pip install 'mtrain[te]'" if has_gpu() else "there is no GPU"
        )
        raise RuntimeError(
            f"--transformer_impl te needs Transformer Engine, but {reason}; "
            "or use --transformer_impl torch"
        )
    if transformer_impl == "auto":
        return "te" if usable else "torch"
    return transformer_impl


def spec_provider(backend: str) -> Provider:
    """The modules of a backend, "te" or "torch"."""
    return TransformerEngineProvider() if backend == "te" else TorchProvider()


def block_spec(
    config: TransformerConfig, provider: Provider, *, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Specs of the layers of one pipeline chunk, dense or mixture-of-experts each, and its norm."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    is_moe = _moe_layers(config)
    layers = [
        layer_spec(config, provider, is_moe=is_moe[number])
        for number in range(first, first + num_layers)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=provider.layer_norm())


def _moe_layers(config: TransformerConfig) -> list[bool]:
    """Which layers of the model are mixture-of-experts layers."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [number % frequency == 0 for number in range(config.num_layers)]
    return [bool(entry) for entry in frequency]


def layer_spec(config: TransformerConfig, provider: Provider, *, is_moe: bool) -> ModuleSpec:
    """Spec of one decoder layer with grouped-query attention."""
    fuses_norm = provider.fuse_layernorm_and_linear()
    norm = provider.layer_norm()
    qk_norm = provider.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    linear_qkv = (
        provider.column_parallel_layer_norm_linear()
        if fuses_norm
        else provider.column_parallel_linear()
    )
    attention = ModuleSpec(
        module=provider.self_attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv,
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = get_mlp_module_spec_for_backend(
        provider,
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=True,
    )
    if is_moe:
        mlp.submodules.router = BalancedRouter
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fuses_norm else norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm if is_moe or not fuses_norm else IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
