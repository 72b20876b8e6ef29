"""Tells two checkpoints apart that have the same tensors with other values.

The one thing to know: it is a sample and no proof. A few bytes of some tensors are read, so that it
takes no time; models that were trained differ in all of them. Cutting a checkpoint into other files
does not change it, converting its dtype does.
"""

from __future__ import annotations

import hashlib

from mtrain.bridge.safetensors_header import tensor_bytes
from mtrain.bridge.sources import StoredShape, StoredWeights, TensorSource

# Bounds the reads on network file systems.
_NUM_TENSORS = 256
_NUM_BYTES = 64


def fingerprint(weights: StoredWeights) -> str:
    """SHA-256 of all names, dtypes and shapes, and of bytes from the middle of some tensors.

    Args:
        weights: A checkpoint in any format; the same tensors give the same fingerprint.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    tensors = sorted(weights.tensors.items())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
    step = -(-len(tensors) // _NUM_TENSORS)
    with weights.open() as source:
        for name, tensor in tensors[::step]:
            digest.update(_middle(source, name, tensor))
    return digest.hexdigest()


def _middle(source: TensorSource, name: str, tensor: StoredShape) -> bytes:
    """The bytes in the middle of a tensor, out of the rows that hold them."""
    # Here, not above: reading headers does without it.
    import torch

    num_bytes = tensor_bytes(tensor.dtype, tensor.shape)
    start = max(0, num_bytes - _NUM_BYTES) // 2
    stop = start + min(_NUM_BYTES, num_bytes)
    row_bytes = tensor_bytes(tensor.dtype, tensor.shape[1:])
    first, last = start // row_bytes, -(-stop // row_bytes)
    rows = source.slices(name)[first:last].contiguous().flatten().view(torch.uint8)
    return bytes(rows[start - first * row_bytes : stop - first * row_bytes].numpy())
