"""Checkpoints in 8-bit floats, made by the plainest possible loops."""

from pathlib import Path

import torch

from mtrain.bridge.storage.quantization import Fp8Blocks
from tests.bridge.storage.checkpoints import rewritten, tensors_of

# Neither divides the sizes of the tiny models, so that the last blocks are smaller.
BLOCKS = Fp8Blocks(rows=20, columns=28)


def quantize_slowly(values: torch.Tensor, blocks: Fp8Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit floats and factors of a matrix, block by block."""
    rows, columns = values.shape
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(blocks.scale_shape((rows, columns)))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (
                slice(i * blocks.rows, (i + 1) * blocks.rows),
                slice(j * blocks.columns, (j + 1) * blocks.columns),
            )
            block = values[at].float()
            scales[i, j] = block.abs().max() / 448 if block.any() else 1.0
            quantized[at] = (block / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return quantized, scales


def dequantize_slowly(
    quantized: torch.Tensor, scales: torch.Tensor, blocks: Fp8Blocks
) -> torch.Tensor:
    """The bfloat16 values, element by element."""
    values = torch.empty(quantized.shape)
    for i in range(quantized.shape[0]):
        for j in range(quantized.shape[1]):
            scale = scales[i // blocks.rows, j // blocks.columns]
            values[i, j] = quantized[i, j].float() * scale.float()
    return values.bfloat16()


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of those that are: projections, no router, no embedding."""
    return tensor.dim() >= 2 and "_proj" in name


def quantized_copy(source: Path, folder: Path, blocks: Fp8Blocks = BLOCKS) -> Path:
    """The same checkpoint with its projections in 8-bit floats."""
    tensors = {}
    for name, tensor in tensors_of(source).items():
        if not is_quantized(name, tensor):
            tensors[name] = tensor
            continue
        matrices = tensor if tensor.dim() == 3 else tensor[None]
        pairs = [quantize_slowly(matrix, blocks) for matrix in matrices]
        values, scales = (torch.stack(part) for part in zip(*pairs, strict=True))
        tensors[name] = values.view(tensor.shape)
        tensors[f"{name}_scale_inv"] = scales if tensor.dim() == 3 else scales[0]
    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [blocks.rows, blocks.columns],
    }
    return rewritten(source, folder, tensors, quantization_config=settings)
