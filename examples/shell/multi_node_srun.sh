#!/usr/bin/env bash
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
# Qwen2.5-32B on 2 nodes of 8 GPUs, one task a GPU: srun starts the ranks, mtrain joins them.
#     sbatch examples/shell/multi_node_srun.sh /shared/Qwen2.5-32B-Instruct /shared/data.jsonl
# Model, data, output and home (the cache) must be on a file system that all nodes see.
set -euo pipefail

srun megatron sft \
    --model "$1" --dataset "$2" --torch_dtype bfloat16 \
    --tensor_model_parallel_size 4 --pipeline_model_parallel_size 2 \
    --packing true --max_length 8192 --recompute_granularity full \
    --micro_batch_size 1 --global_batch_size 64 --num_train_epochs 2 \
    --lr 1e-5 --min_lr 1e-6 --lr_warmup_fraction 0.05 \
    --save_strategy epoch --save_total_limit 2 --output_dir output/qwen2.5-32b
