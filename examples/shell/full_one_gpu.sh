#!/usr/bin/env bash
# All parameters of Qwen3-4B on one GPU of 141 GB, documents packed into rows of 8,192 tokens.
#     examples/shell/full_one_gpu.sh data.jsonl
set -euo pipefail
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

megatron sft \
    --model Qwen/Qwen3-4B --use_hf true --torch_dtype bfloat16 \
    --dataset "$1" --split_dataset_ratio 0.01 \
    --packing true --max_length 8192 --truncation_strategy delete \
    --micro_batch_size 1 --global_batch_size 16 --num_train_epochs 1 \
    --lr 1e-5 --min_lr 1e-6 --lr_warmup_fraction 0.05 \
    --eval_steps 100 --save_steps 500 --save_total_limit 2 \
    --output_dir output/qwen3-4b
