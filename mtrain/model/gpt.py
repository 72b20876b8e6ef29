"""The language model: Megatron-Core's GPT with packed documents and a loss of our own.

The one thing to know: `forward` takes document boundaries as `cu_seqlens`, whatever the backend;
how attention and rotary embeddings are told about them is decided here and nowhere else.
"""

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

from mtrain.bridge.family import GPTArguments
from mtrain.model.documents import PackedDocuments, pack_documents
from mtrain.model.head import LossTargets, OutputLayer
from mtrain.model.loss import vocab_parallel_loss
from mtrain.model.next_tokens import next_labels, note_loss
from mtrain.model.rope import RotaryEmbedding


class LanguageModel(GPTModel):
    """One pipeline chunk of a decoder-only language model.

    Args:
        arguments: What the checkpoint decides.
        packed_format: "thd" where attention kernels take packed sequences as `[tokens, heads,
            head_dim]` (Transformer Engine), "sbhd" where they keep `[seq, 1, heads, head_dim]`.
        device: Where the model is.
        **gpt_arguments: Other arguments of Megatron-Core's `GPTModel`.
    """

    def __init__(
        self,
        *,
        arguments: GPTArguments,
        packed_format: str,
        device: torch.device,
        **gpt_arguments: Any,
    ) -> None:
        rope = arguments.rope
        self.packed_format = packed_format  # first, for `_set_attention_backend`
        super().__init__(
            max_sequence_length=arguments.max_position_embeddings,
            share_embeddings_and_output_weights=arguments.is_tied,
            # Layers rotate with cosines and sines of our own.
            position_embedding_type="none" if rope else "learned_absolute",
            **gpt_arguments,
        )
        if self.post_process:
            self.output_layer.__class__ = OutputLayer
        self.num_words = arguments.vocab_size
        self.embedding_scale = arguments.embedding_scale
        self.rotary = self.window_rotary = None
        if rope is not None:
            self.rotary = RotaryEmbedding(rope, device)
            if arguments.window_rope is not None:
                self.window_rotary = RotaryEmbedding(arguments.window_rope, device)

    def _set_attention_backend(self) -> None:
        """Names the kernel in the environment, if Transformer Engine is there to read it.

        Elsewhere it would only keep the process from building a model with another kernel.

        Raises:
            ValueError: The environment names another one.
        """
        if self.packed_format != "thd":
            return
        try:
            super()._set_attention_backend()
        except AssertionError as error:
            raise ValueError(str(error)) from error

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: None = None,
        labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        padding_mask: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
        loss_gradient: torch.Tensor | None = None,
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
            label_positions: int64 [num_labels], where the flattened `labels` are not -100. Other
                positions then do not go through the output layer.
            loss_gradient: float64 scalar on the device (of float32 arguments half-precision
                wrappers make others), what the gradient of every token's loss will be, if that is
                known; see `LossTargets`. It must be the same for all of them in any case, unless
                the output layer is frozen.

        Returns:
            Before the last stage: hidden states [seq, batch, hidden] (sequence-parallel: this
            rank's part). On it, with labels: losses float32 [batch, seq] and correct bool
            [batch, seq]; without: logits [batch, seq, padded_vocab / tp_size].
        """
        return super().forward(
            input_ids,
            position_ids,
            attention_mask,
            # Megatron-Core hands them to `_postprocess` unseen.
            labels=self._targets(labels, label_positions, loss_gradient),
            packed_seq_params=self._packed(cu_seqlens, max_seqlen, input_ids.numel()),
            padding_mask=padding_mask,
        )

    def _packed(
        self, cu_seqlens: torch.Tensor | None, max_seqlen: int | None, num_tokens: int
    ) -> PackedDocuments | None:
        """Document boundaries as layers take them."""
        if cu_seqlens is None:
            return None
        self._longest_document = max_seqlen
        return pack_documents(
            cu_seqlens,
            longest=max_seqlen,
            num_tokens=num_tokens,
            packed_format=self.packed_format,
            config=self.config,
        )

    def _targets(
        self,
        labels: torch.Tensor | None,
        label_positions: torch.Tensor | None,
        loss_gradient: torch.Tensor | None,
    ) -> LossTargets | None:
        """The labels as the output layer takes them, where it is."""
        if labels is None or not self.post_process:
            return None
        return LossTargets(
            labels=labels,
            label_positions=label_positions,
            vocab_size=self.num_words,
            loss_gradient=None if loss_gradient is None else loss_gradient.float(),
            # A tied weight has one as the embedding, wherever the embedding is used.
            has_other_gradient=self.share_embeddings_and_output_weights
            and (self.pre_process or self.mtp_process),
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
        """Embeddings, and cosines and sines of every token."""
        hidden, angles, cos, sin, offset, padding_mask_part = super()._preprocess(
            input_ids,
            position_ids,
            decoder_input=decoder_input,
            inference_context=inference_context,
            packed_seq_params=packed_seq_params,
            padding_mask=padding_mask,
        )
        if self.embedding_scale is not None and self.pre_process:
            hidden = hidden * torch.tensor(self.embedding_scale, dtype=hidden.dtype).item()
        if self.rotary is not None:
            angles = self._cosines_and_sines(position_ids, packed_seq_params)
        if padding_mask is not None and self.config.sequence_parallel and not self.pre_process:
            # Megatron-Core cuts the mask on the first stage only; every stage routes.
            cut = scatter_to_sequence_parallel_region(padding_mask.t().contiguous())
            padding_mask_part = cut.t().contiguous()
        return hidden, angles, cos, sin, offset, padding_mask_part

    def _cosines_and_sines(
        self, position_ids: torch.Tensor, packed_seq_params: PackedSeqParams | None
    ) -> torch.Tensor:
        """Of every token; of layers without and with a window one after the other, if they differ.

        One tensor, because recomputation saves nothing else.
        """
        positions, longest = slice(None), position_ids.shape[1]
        if packed_seq_params is not None:
            positions, longest = position_ids.squeeze(0), self._longest_document
        full = self.rotary(positions, longest=longest)
        if self.window_rotary is None:
            return full
        return torch.stack([full, self.window_rotary(positions, longest=longest)])

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: LossTargets | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits, or with labels a loss of ours and the accuracy."""
        if not self.post_process:
            return hidden_states
        if labels is None:
            logits, _ = self.output_layer(hidden_states, weight=self._tied_weight())
            return logits.transpose(0, 1).contiguous()
        losses, correct = self._losses(hidden_states, labels)
        if self.mtp_process:
            losses = losses + self._next_token_losses(
                hidden_states, input_ids, position_ids, labels, *args, **kwargs
            )
        return losses, correct

    def _tied_weight(self) -> torch.Tensor | None:
        """The embedding, where the output layer has no weight of its own."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return None

    def _losses(
        self, hidden_states: torch.Tensor, targets: LossTargets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses float32 [batch, seq] of hidden states behind the last norm, and accuracy."""
        weight = self._tied_weight()
        if type(self.output_layer) is OutputLayer:
            return self.output_layer(hidden_states, weight=weight, targets=targets)
        # With an adapter on it, which adds to the logits.
        logits, _ = self.output_layer(hidden_states, weight=weight)
        return vocab_parallel_loss(
            logits, targets.labels, vocab_size=self.num_words, tp_group=self.pg_collection.tp
        )

    def _next_token_losses(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        targets: LossTargets,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        attention_mask: None = None,
        **_unused: Any,
    ) -> torch.Tensor:
        """Zeros whose gradient is that of the weighted losses of multi-token prediction.

        So the loss that is reported stays the one of the next token.
        """
        hidden_of_layers = self.mtp(
            input_ids=input_ids,
            position_ids=position_ids,
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            embedding=self.embedding,
        ).chunk(1 + self.config.mtp_num_layers)
        total = torch.zeros((), device=hidden_states.device)
        factor = self.config.mtp_loss_scaling_factor / self.config.mtp_num_layers
        if targets.loss_gradient is not None:
            targets = dataclasses.replace(targets, loss_gradient=targets.loss_gradient * factor)
        # The weight's gradient that autograd sees is that of the next token's loss.
        targets = dataclasses.replace(targets, has_other_gradient=True)
        for layer, hidden in enumerate(hidden_of_layers[1:]):
            targets = _one_token_on(targets, position_ids)
            losses, _ = self._losses(hidden, targets)
            note_loss(losses, targets.labels, layer=layer, num_layers=self.config.mtp_num_layers)
            total = total + losses
        weighted = total * factor
        return weighted - weighted.detach()


def _one_token_on(targets: LossTargets, position_ids: torch.Tensor) -> LossTargets:
    """The labels of the positions before, which are those that have one then.

    The position before the first one is the last one, which has none.
    """
    positions = targets.label_positions
    if positions is not None:
        positions = (positions - 1) % targets.labels.numel()
    labels = next_labels(targets.labels, position_ids)
    return dataclasses.replace(targets, labels=labels, label_positions=positions)
