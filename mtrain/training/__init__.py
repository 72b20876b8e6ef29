"""The training loop on Megatron-Core's schedules: optimizer, step, metrics.

It is handed callables for what it must not know: the forward pass, evaluation data, saving.
"""

from mtrain.platform.device import prepare_megatron

prepare_megatron()
