"""The language model: Megatron-Core's GPT with packed documents and a loss of our own.

The one thing to know: `forward` takes document boundaries as `cu_seqlens`, whatever the backend;
how attention and rotary embeddings are told about them is decided here and nowhere else.
"""

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

from mtrain.model.attention import rotary_cosines_and_sines
from mtrain.model.loss import vocab_parallel_loss


class LanguageModel(GPTModel):
    """One pipeline chunk of a decoder-only language model.

    Args:
        num_words: Vocabulary without padding.
        packed_format: "thd" where attention kernels take packed sequences as `[tokens, heads,
            head_dim]` (Transformer Engine), "sbhd" where they keep `[seq, 1, heads, head_dim]`.
        **gpt_arguments: Arguments of Megatron-Core's `GPTModel`.
    """

    def __init__(self, *, num_words: int, packed_format: str, **gpt_arguments: Any) -> None:
        super().__init__(**gpt_arguments)
        self.num_words = num_words
        self.packed_format = packed_format

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: None = None,
        labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Runs this chunk.

        Args:
            input_ids: int64 [batch, seq].
            position_ids: int64 [batch, seq], from 0 in every document.
            attention_mask: Always None; part of Megatron-Core's interface.
            labels: int64 [batch, seq], the word after each position, -100 for no loss.
            cu_seqlens: int32 [num_documents + 1], where documents begin, for packed input
                (batch 1). None for rows that are one document each.
            max_seqlen: Tokens of the longest document; given with `cu_seqlens`.
            padding_mask: bool [batch, seq], True at padding, which then does not count in the
                balance of the experts.

        Returns:
            Before the last stage: hidden states [seq, batch, hidden] (sequence-parallel: this
            rank's part). On it, with labels: losses float32 [batch, seq] and correct bool
            [batch, seq]; without: logits [batch, seq, padded_vocab / tp_size].
        """
        packed = None
        if cu_seqlens is not None:
            longest = _power_of_two_above(max_seqlen)
            packed = PackedSeqParams(
                qkv_format=self.packed_format,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
        return super().forward(
            input_ids,
            position_ids,
            attention_mask,
            labels=labels,
            packed_seq_params=packed,
            padding_mask=padding_mask,
        )

    def _preprocess(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        decoder_input: torch.Tensor | None = None,
        inference_context: None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Embeddings and rotary angles; "sbhd" layers take cosines and sines of each token."""
        hidden, rotary, cos, sin, offset, padding_mask_part = super()._preprocess(
            input_ids,
            position_ids,
            decoder_input=decoder_input,
            inference_context=inference_context,
            packed_seq_params=packed_seq_params,
            padding_mask=padding_mask,
        )
        if self.packed_format == "sbhd":
            positions = slice(None) if packed_seq_params is None else position_ids.squeeze(0)
            rotary = rotary_cosines_and_sines(rotary, positions)
        if padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            # Megatron-Core cuts the mask on the first stage only; every stage routes.
            cut = scatter_to_sequence_parallel_region(padding_mask.t().contiguous())
            padding_mask_part = cut.t().contiguous()
        return hidden, rotary, cos, sin, offset, padding_mask_part

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Megatron-Core's, but with labels the loss is ours and comes with the accuracy."""
        if labels is None or not self.post_process:
            return super()._postprocess(
                hidden_states, input_ids, position_ids, None, *args, **kwargs
            )
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return vocab_parallel_loss(
            logits, labels, vocab_size=self.num_words, tp_group=self.pg_collection.tp
        )


def _power_of_two_above(length: int) -> int:
    """A bound that few packs differ in: attention kernels are planned anew for every other one."""
    return 1 << max(0, length - 1).bit_length()
