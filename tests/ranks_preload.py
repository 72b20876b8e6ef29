"""Imported once by the fork server, so that a new rank starts with Megatron-Core at hand."""

import torch

from mtrain.platform.device import prepare_megatron

torch.set_num_threads(1)
prepare_megatron()
