#!/bin/bash
# Makes assets/demo/base.safetensors again: data, two stages of training without reduction, and the file. About an hour
# on two CPU cores. Killed and started again, it resumes where it was.
set -eu
cd "$(dirname "$0")/../.."
python=.venv/bin/python
# One single-threaded process a core is faster here than one process with two threads.
export OMP_NUM_THREADS=1
train() { .venv/bin/torchrun --standalone --nproc_per_node 2 recipes/finetune.py "$@"; }

$python scripts/make_demo_data.py --out runs/demo_base/stills --seed 7 --frames 1 --fps 2 --questions-per-video 4 \
  --train 16000 --validation 256
train experiment=demo_base
$python scripts/save_weights.py --checkpoint runs/demo_base --out runs/demo_base/stills.safetensors

$python scripts/make_demo_data.py --out runs/demo_base/clips --seed 8 --frames 16 --fps 2 --questions-per-video 5 \
  --train 3000 --validation 256
train experiment=demo_base_clips
rm -f assets/demo/base.safetensors
$python scripts/save_weights.py --checkpoint runs/demo_base_clips --out assets/demo/base.safetensors --dtype bf16
