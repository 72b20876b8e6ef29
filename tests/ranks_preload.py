"""Imported once by the fork server, so that a new rank starts with all it needs at hand.

What a rank imports itself, it imports again in every test: pytest alone is a fifth of a second.
"""

import gc
import importlib

import torch

from mtrain.platform.device import prepare_megatron

for name in (
    "mtrain.cli.precision",
    "mtrain.cli.sft",
    "pytest",
    "tests.adapters",
    "tests.lora.peft_folders",
    "tests.machine",
    "tests.megatron",
    "torch.utils.tensorboard",
):
    importlib.import_module(name)
torch.set_num_threads(1)
prepare_megatron()
# A collector of garbage that looked through all this in a rank would copy its memory.
gc.collect()
gc.freeze()
