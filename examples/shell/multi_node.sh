#!/usr/bin/env bash
# Qwen2.5-32B on 2 nodes of 8 GPUs without a scheduler: run this on each node, with the same
# address and the number of the node. mtrain starts the 8 ranks of its node.
#     NODE_RANK=0 MASTER_ADDR=10.0.0.1 examples/shell/multi_node.sh MODEL DATA
#     NODE_RANK=1 MASTER_ADDR=10.0.0.1 examples/shell/multi_node.sh MODEL DATA
# A torchrun of your own works as well: torchrun [its options] -m mtrain.cli.main sft [flags].
# Model, data and output must be on a file system that all nodes see.
set -euo pipefail
export NNODES=2 NPROC_PER_NODE=8 MASTER_PORT=${MASTER_PORT:-29500}

megatron sft \
    --model "$1" --dataset "$2" --torch_dtype bfloat16 \
    --tensor_model_parallel_size 4 --pipeline_model_parallel_size 2 \
    --packing true --max_length 8192 --recompute_granularity full \
    --micro_batch_size 1 --global_batch_size 64 --num_train_epochs 2 \
    --lr 1e-5 --min_lr 1e-6 --lr_warmup_fraction 0.05 \
    --save_strategy epoch --save_total_limit 2 --output_dir output/qwen2.5-32b
