#!/usr/bin/env bash
# An adapter (LoRA) for Qwen3-30B-A3B, its experts included, on 8 GPUs: experts over all 8, the rest
# data parallel; then a model with the adapter merged, made by the same ranks.
#     examples/shell/lora_moe.sh data.jsonl
set -euo pipefail
export NPROC_PER_NODE=8
out=output/qwen3-30b-a3b-lora

megatron sft \
    --model Qwen/Qwen3-30B-A3B-Instruct-2507 --use_hf true --torch_dtype bfloat16 \
    --expert_model_parallel_size 8 \
    --tuner_type lora --lora_rank 8 --lora_alpha 32 --target_modules all-linear \
    --moe_aux_loss_coeff 1e-3 --moe_permute_fusion true --recompute_granularity full \
    --dataset "$1" --split_dataset_ratio 0.01 \
    --packing true --max_length 4096 \
    --micro_batch_size 1 --global_batch_size 64 --num_train_epochs 1 \
    --lr 1e-4 --min_lr 1e-5 --lr_warmup_fraction 0.05 \
    --save_strategy epoch --output_dir "$out" --add_version false

adapter=$out/checkpoint-$(cat "$out/latest_checkpointed_iteration.txt")
megatron export \
    --model Qwen/Qwen3-30B-A3B-Instruct-2507 --use_hf true --adapters "$adapter" \
    --expert_model_parallel_size 8 --merge_lora true --to_hf true --output_dir "$out/merged"
