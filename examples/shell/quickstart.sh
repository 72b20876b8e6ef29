#!/usr/bin/env bash
# Teaches a tiny Qwen3 who it is, gives it another name by LoRA, and asks it: 1.5 minutes on two cores.
#     examples/shell/quickstart.sh [new folder]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-$(mktemp -d)}
export CUDA_VISIBLE_DEVICES= # on the CPU, also where there is a GPU
export NPROC_PER_NODE=2
questions=("Who are you?" "What should I call you?" "你是谁？")

megatron demo --output_dir "$work/model" --num_layers 2
megatron sft --model "$work/model" \
    --dataset swift/self-cognition --model_name "Little Finch" --model_author "the mtrain authors" \
    --micro_batch_size 8 --global_batch_size 16 --train_iters 200 --logging_steps 50 \
    --lr 3e-3 --lr_warmup_fraction 0.05 --output_dir "$work/full" --add_version false
base=$work/full/checkpoint-200
python "$here/../ask.py" "$base" "${questions[@]}" --expect "Little Finch"

megatron sft --model "$base" --tuner_type lora --lora_rank 16 \
    --dataset swift/self-cognition --model_name "Blue Heron" --model_author "the river guild" \
    --micro_batch_size 8 --global_batch_size 16 --train_iters 140 --logging_steps 35 \
    --lr 1e-2 --lr_warmup_fraction 0.05 --output_dir "$work/lora" --add_version false
adapter=$work/lora/checkpoint-140
python "$here/../ask.py" "$base" --adapter "$adapter" "${questions[@]}" --expect "Blue Heron"

megatron export --model "$base" --adapters "$adapter" --merge_lora true --to_hf true \
    --output_dir "$work/merged"
python "$here/../ask.py" "$work/merged" "${questions[@]}" --expect "Blue Heron"
echo "Everything is in $work"
