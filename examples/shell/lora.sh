#!/usr/bin/env bash
# An adapter (LoRA) for Qwen3-8B on 8 GPUs, data parallel, then a model with the adapter merged.
#     examples/shell/lora.sh data.jsonl
set -euo pipefail
export NPROC_PER_NODE=8
out=output/qwen3-8b-lora

megatron sft \
    --model Qwen/Qwen3-8B --use_hf true --torch_dtype bfloat16 \
    --tuner_type lora --lora_rank 16 --lora_alpha 32 --target_modules all-linear \
    --dataset "$1" --split_dataset_ratio 0.01 \
    --packing true --max_length 8192 \
    --micro_batch_size 1 --global_batch_size 32 --num_train_epochs 2 \
    --lr 1e-4 --min_lr 1e-5 --lr_warmup_fraction 0.05 \
    --save_strategy epoch --output_dir "$out" --add_version false

adapter=$out/checkpoint-$(cat "$out/latest_checkpointed_iteration.txt")
NPROC_PER_NODE=1 megatron export \
    --model Qwen/Qwen3-8B --use_hf true --adapters "$adapter" \
    --merge_lora true --to_hf true --output_dir "$out/merged"
