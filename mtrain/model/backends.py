"""The two ways to compute a layer, as Megatron-Core layer specs.

Both have Megatron-Core's linears, made lean, and norms, gated MLPs and experts of our own. `te`
takes Transformer Engine's attention, which asks cuDNN; `torch` needs no extra package. So their
parameters have the same names.
"""

from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from mtrain.bridge.family import LayerArguments
from mtrain.model.attention import PackedAttention, RotarySelfAttention
from mtrain.model.delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from mtrain.model.dispatch import ExpertLayer
from mtrain.model.experts import GroupedExperts
from mtrain.model.latent_attention import LatentSelfAttention
from mtrain.model.layer import DecoderLayer
from mtrain.model.linear import ColumnLinear, RowLinear
from mtrain.model.mlp import GatedMLP
from mtrain.model.next_tokens import NextTokenLayer
from mtrain.model.norm import RMSNorm, norm_class
from mtrain.model.residual import NormedResidual
from mtrain.model.router import BalancedRouter
from mtrain.platform.device import has_gpu, has_transformer_engine


class TorchProvider(LocalSpecProvider):
    """Megatron-Core's linears, our norm, attention and experts."""

    packed_format = "sbhd"

    def column_parallel_linear(self) -> type:
        """A linear whose outputs ranks share."""
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        """A linear whose inputs ranks share."""
        return RowLinear

    def core_attention(self) -> type:
        """Attention between queries, keys and values."""
        return PackedAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, None]:
        """Experts; they have no submodules to choose."""
        return GroupedExperts, None


class TransformerEngineProvider(TorchProvider):
    """The same with Transformer Engine's attention.

    Its linears and norms take the host four times as long to launch, and their products are those
    of torch.
    """

    packed_format = "thd"

    def core_attention(self) -> type:
        """Attention between queries, keys and values."""
        # Without Transformer Engine there is nothing to inherit from.
        from mtrain.model.te_attention import TransformerEngineAttention

        return TransformerEngineAttention


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


def spec_provider(backend: str, *, has_sinks: bool = False) -> TorchProvider:
    """The modules of a backend.

    Args:
        backend: "te" or "torch".
        has_sinks: Whether heads of attention have sinks.
    """
    # None of Transformer Engine's kernels has sinks in packed sequences.
    if backend == "torch" or has_sinks:
        return TorchProvider()
    return TransformerEngineProvider()


def block_spec(
    config: TransformerConfig,
    provider: TorchProvider,
    *,
    layers: LayerArguments,
    fuses_rope: bool,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """Specs of the layers of one pipeline chunk, dense or mixture-of-experts each, and its norm.

    Args:
        config: Model shape.
        provider: Modules of the backend.
        layers: What else the layers are made of.
        fuses_rope: See `layer_spec`.
        vp_stage: Virtual pipeline stage, if there are any.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    is_moe = _moe_layers(config)
    specs = [
        layer_spec(
            config,
            provider,
            layers=layers,
            is_moe=is_moe[number],
            is_delta_net=number in layers.delta_net_layers,
            fuses_rope=fuses_rope,
        )
        for number in range(first, first + num_layers)
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm_class(config))


def next_tokens_spec(
    config: TransformerConfig, provider: TorchProvider, *, layers: LayerArguments, fuses_rope: bool
) -> ModuleSpec:
    """Spec of the layers of multi-token prediction; arguments as for `block_spec`."""
    norm = norm_class(config)
    layer = ModuleSpec(
        module=NextTokenLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm,
            hnorm=norm,
            eh_proj=provider.column_parallel_linear(),
            transformer_layer=layer_spec(
                config,
                provider,
                layers=layers,
                is_moe=_moe_layers(config)[-1],
                is_delta_net=False,
                fuses_rope=fuses_rope,
            ),
            layer_norm=norm,
        ),
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * config.mtp_num_layers),
    )


def _moe_layers(config: TransformerConfig) -> list[bool]:
    """Which layers of the model are mixture-of-experts layers."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [number % frequency == 0 for number in range(config.num_layers)]
    return [bool(entry) for entry in frequency]


def layer_spec(
    config: TransformerConfig,
    provider: TorchProvider,
    *,
    layers: LayerArguments,
    is_moe: bool,
    is_delta_net: bool,
    fuses_rope: bool,
) -> ModuleSpec:
    """Spec of one decoder layer.

    Args:
        config: Model shape.
        provider: Modules of the backend.
        layers: What else the layers are made of.
        is_moe: Whether it has experts.
        is_delta_net: Whether it has a gated delta net in place of attention.
        fuses_rope: Whether attention may rotate in a kernel of ours.
    """
    norm = norm_class(config)
    if is_delta_net:
        attention = _delta_net(provider)
    elif config.multi_latent_attention:
        attention = _latent_attention(config, provider, is_interleaved=layers.is_rope_interleaved)
    else:
        attention = _attention(config, provider, fuses_rope=fuses_rope)
    add = get_bias_dropout_add
    if layers.has_sublayer_norms:
        add = ModuleSpec(module=NormedResidual, params={"config": config})
    return ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=_mlp(config, provider, layers=layers, is_moe=is_moe),
            mlp_bda=add,
        ),
    )


def _attention(
    config: TransformerConfig, provider: TorchProvider, *, fuses_rope: bool
) -> ModuleSpec:
    """Grouped-query attention."""
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=RotarySelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "fuses_rope": fuses_rope},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _latent_attention(
    config: MLATransformerConfig, provider: TorchProvider, *, is_interleaved: bool
) -> ModuleSpec:
    """Multi-head latent attention."""
    up = provider.column_parallel_linear()
    return ModuleSpec(
        module=LatentSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "is_interleaved": is_interleaved},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=provider.column_parallel_linear(),
            linear_q_up_proj=up,
            linear_kv_up_proj=up,
            core_attention=partial(
                provider.core_attention(),
                k_channels=config.qk_head_dim + config.qk_pos_emb_head_dim,
                v_channels=config.v_head_dim,
            ),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=RMSNorm,
            kv_layernorm=RMSNorm,
        ),
    )


def _delta_net(provider: TorchProvider) -> ModuleSpec:
    return ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=provider.column_parallel_linear(), out_proj=provider.row_parallel_linear()
        ),
    )


def _mlp(
    config: TransformerConfig, provider: TorchProvider, *, layers: LayerArguments, is_moe: bool
) -> ModuleSpec:
    mlp = get_mlp_module_spec_for_backend(
        provider,
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=True,
    )
    if mlp.module is MLP:
        mlp.module = GatedMLP
    if is_moe:
        mlp.module = ExpertLayer
        mlp.submodules.router = partial(BalancedRouter, group_scores=layers.group_scores)
    return mlp
