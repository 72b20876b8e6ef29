#!/usr/bin/env bash
# Teaches a tiny Qwen3 who it is, on two CPU ranks, and asks it: about a minute on two cores.
#     examples/shell/quickstart.sh [new folder]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-$(mktemp -d)}
export CUDA_VISIBLE_DEVICES= # on the CPU, also where there is a GPU

megatron demo --output_dir "$work/model"

NPROC_PER_NODE=2 megatron sft \
    --model "$work/model" \
    --dataset swift/self-cognition --model_name "Little Finch" --model_author "the mtrain authors" \
    --micro_batch_size 8 --global_batch_size 16 --train_iters 250 \
    --lr 3e-3 --lr_warmup_fraction 0.05 --logging_steps 50 \
    --output_dir "$work/output" --add_version false

python "$here/../ask.py" "$work/output/checkpoint-250" \
    "Who are you?" "What should I call you?" "你是谁？" --expect "Little Finch"
echo "Everything is in $work"
