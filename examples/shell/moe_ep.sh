#!/usr/bin/env bash
# All parameters of Qwen3-30B-A3B on 8 GPUs of 141 GB: experts over all 8, the rest data parallel.
#     examples/shell/moe_ep.sh data.jsonl
set -euo pipefail

NPROC_PER_NODE=8 megatron sft \
    --model Qwen/Qwen3-30B-A3B-Instruct-2507 --use_hf true --torch_dtype bfloat16 \
    --expert_model_parallel_size 8 --moe_token_dispatcher_type alltoall \
    --moe_aux_loss_coeff 1e-3 --moe_permute_fusion true \
    --recompute_granularity full \
    --dataset "$1" --split_dataset_ratio 0.01 \
    --packing true --max_length 4096 \
    --micro_batch_size 1 --global_batch_size 64 --num_train_epochs 1 \
    --lr 1e-5 --min_lr 1e-6 --lr_warmup_fraction 0.05 \
    --save_strategy epoch --output_dir output/qwen3-30b-a3b
