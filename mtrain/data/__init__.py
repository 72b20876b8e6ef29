"""From files of conversations to packed batches of token ids; knows nothing of Megatron."""
