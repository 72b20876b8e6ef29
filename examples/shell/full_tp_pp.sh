#!/usr/bin/env bash
# All parameters of Llama 3.1 8B on 8 GPUs: tensor parallel 2 (with sequence parallelism),
# pipeline 2, in 2 virtual stages each; the remaining factor of 2 is data parallel.
#     examples/shell/full_tp_pp.sh data.jsonl
set -euo pipefail

NPROC_PER_NODE=8 megatron sft \
    --model meta-llama/Llama-3.1-8B-Instruct --use_hf true --torch_dtype bfloat16 \
    --tensor_model_parallel_size 2 \
    --pipeline_model_parallel_size 2 --virtual_pipeline_model_parallel_size 2 \
    --overlap_grad_reduce true --overlap_param_gather true \
    --dataset "$1" --split_dataset_ratio 0.01 \
    --packing true --max_length 8192 \
    --micro_batch_size 1 --global_batch_size 32 --num_train_epochs 1 \
    --lr 1e-5 --min_lr 1e-6 --lr_warmup_fraction 0.05 \
    --save_strategy epoch --output_dir output/llama-3.1-8b
