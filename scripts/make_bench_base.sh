#!/bin/bash
# Makes the study's base model and data: assets/bench/base.safetensors, runs/bench/clips and runs/bench/features. Some
# hours on two CPU cores. Killed and started again, it goes on where it was.
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
# One single-threaded process a core is faster here than one process with two threads.
export OMP_NUM_THREADS=1
train() { .venv/bin/torchrun --standalone --nproc_per_node 2 recipes/finetune.py trainer.devices=2 "$@"; }

# The demo's base, deepened: computes the same at first.
$python scripts/grow_depth.py --weights assets/demo/base.safetensors --pattern 'M-M*-M-M*-' \
  --deeper 'M*-M*-M-M*-M-M*-' --positions 0 2 3 4 5 8 10 13 14 15 --out runs/bench_base/grown.safetensors

# First stage: the same clips at 16 frames, everything learns.
$python scripts/make_bench_data.py --out runs/bench_base/clips16 --frames 16 --visible-frames 1 4 --seed 11 \
  --train 7000 --validation 300
train experiment=bench_base_clips
$python scripts/save_weights.py --checkpoint runs/bench_base_clips --out runs/bench_base/clips16.safetensors

# Second stage: 128 frames, features of the tower computed once.
$python scripts/make_bench_data.py --out runs/bench/clips --seed 12 --train 640 --validation 240
for split in train validation; do
  $python scripts/precompute_features.py experiment=bench model.init_checkpoint=runs/bench_base/clips16.safetensors \
    --data runs/bench/clips/$split --out runs/bench/features/$split
done
train experiment=bench_base
$python scripts/save_weights.py --checkpoint runs/bench_base --out assets/bench/base.safetensors --dtype bf16
