"""Tells two checkpoints apart that have the same tensors with other values.

The one thing to know: it is a sample and no proof. A few bytes of some tensors are read, so that it
takes no time; models that were trained differ in all of them. Cutting a checkpoint into other files
does not change it, converting its dtype does.
"""

from __future__ import annotations

import hashlib

from mtrain.bridge.safetensors_folder import Checkpoint

# Bounds the reads on network file systems.
_NUM_TENSORS = 256
_NUM_BYTES = 64


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of all names, dtypes and shapes, and of bytes from the middle of some tensors.

    Args:
        checkpoint: From `open_checkpoint`.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    tensors = sorted(checkpoint.tensors.items())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
    step = -(-len(tensors) // _NUM_TENSORS)
    for _, tensor in tensors[::step]:
        middle = max(0, tensor.num_bytes - _NUM_BYTES) // 2
        with tensor.path.open("rb") as file:
            file.seek(tensor.start + middle)
            digest.update(file.read(min(_NUM_BYTES, tensor.num_bytes)))
    return digest.hexdigest()
