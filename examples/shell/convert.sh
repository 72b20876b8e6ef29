#!/usr/bin/env bash
# Converts a checkpoint to Megatron-Core's format and back, proves both, and compares the two.
# Needs no GPU. MODEL is a Hugging Face folder or id.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen3-30B-A3B}
OUT=${OUT:-output/convert}

NPROC_PER_NODE=4 megatron export --model "$MODEL" --to_mcore true --output_dir "$OUT/mcore" \
    --tensor_model_parallel_size 2 --expert_model_parallel_size 2 --pipeline_model_parallel_size 2 \
    --test_convert_precision true
NPROC_PER_NODE=4 megatron export --mcore_model "$OUT/mcore" --to_hf true --output_dir "$OUT/hf" \
    --tensor_model_parallel_size 2 --expert_model_parallel_size 2 --pipeline_model_parallel_size 2 \
    --test_convert_precision true
megatron verify "$OUT/mcore"
megatron verify "$OUT/mcore" "$OUT/hf"
