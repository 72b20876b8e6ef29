"""Imported once by the fork server, so that a new rank starts with Megatron-Core at hand."""

import torch

import mtrain.cli.sft  # noqa: F401  what ranks are tested on, imported once
import tests.adapters  # noqa: F401  PEFT
from mtrain.platform.device import prepare_megatron

torch.set_num_threads(1)
prepare_megatron()
