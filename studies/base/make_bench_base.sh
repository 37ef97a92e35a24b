#!/bin/bash
# Makes what recipes/study.py starts from. Killed and started again, it resumes where it was.
#   studies/base/make_bench_base.sh data   the data for the base model that is in the repository: runs/bench/clips and
#                                          runs/bench/features (some minutes on two CPU cores)
#   studies/base/make_bench_base.sh        the base model anew as well, assets/bench/base.safetensors (some hours)
set -eu
case "${1-all}" in data | all) ;; *) echo "make_bench_base.sh: '$1' is neither data nor all (the default)" >&2; exit 2 ;; esac
cd "$(dirname "$0")/../.."
python=.venv/bin/python
# One single-threaded process a core is faster here than one process with two threads.
export OMP_NUM_THREADS=1
train() { .venv/bin/torchrun --standalone --nproc_per_node 2 recipes/finetune.py trainer.devices=2 "$@"; }

clips() { $python studies/base/make_bench_data.py --out runs/bench/clips --seed 12 --train 640 --validation 245; }
features() {  # weights, folder of the clips, folder for the features, which is there only when it is whole
  [ -d "$3" ] || $python scripts/precompute_features.py experiment=bench "model.init_checkpoint=$1" --data "$2" --out "$3"
}
final_features() {  # weights
  for split in train validation; do
    features "$1" runs/bench/clips/$split runs/bench/features/$split
  done
}
if [ "${1-all}" = data ]; then
  clips
  final_features assets/bench/base.safetensors
  exit
fi

# The demo's base, deepened: computes the same at first.
$python studies/base/grow_depth.py --weights assets/demo/base.safetensors --pattern 'M-M*-M-M*-' \
  --deeper 'M*-M*-M-M*-M-M*-' --positions 0 2 3 4 5 8 10 13 14 15 --out runs/bench_base/grown.safetensors

# First stage: the same clips at 16 frames, everything learns.
$python studies/base/make_bench_data.py --out runs/bench_base/clips16 --frames 16 --visible-frames 1 4 --seed 11 \
  --train 7000 --validation 300
train experiment=bench_base_clips
$python scripts/save_weights.py --checkpoint runs/bench_base_clips --out runs/bench_base/clips16.safetensors

# Second stage: 4 frames, then for a while 16 again.
$python studies/base/make_bench_data.py --out runs/bench_base/clips4 --frames 4 --visible-frames 1 1 --seed 13 \
  --train 9000 --validation 280
train experiment=bench_base_dense
$python scripts/save_weights.py --checkpoint runs/bench_base_dense --out runs/bench_base/clips4.safetensors
train experiment=bench_base_clips name=bench_base_clips_again model.init_checkpoint=runs/bench_base/clips4.safetensors \
  trainer.max_steps=250 optim.lr=5e-4
$python scripts/save_weights.py --checkpoint runs/bench_base_clips_again --out runs/bench_base/clips16_again.safetensors

# Third stage: 128 frames, features of the tower computed once; then 4 frames again.
clips
features runs/bench_base/clips16_again.safetensors runs/bench/clips/train runs/bench_base/features_first
train experiment=bench_base name=bench_base_first model.init_checkpoint=runs/bench_base/clips16_again.safetensors \
  data.train=runs/bench_base/features_first data.validation=null trainer.max_steps=160
$python scripts/save_weights.py --checkpoint runs/bench_base_first --out runs/bench_base/first.safetensors
train experiment=bench_base_dense name=bench_base_dense_again model.init_checkpoint=runs/bench_base/first.safetensors \
  trainer.max_steps=480
$python scripts/save_weights.py --checkpoint runs/bench_base_dense_again --out runs/bench_base/clips4_again.safetensors

# Last stage: 128 frames with the final tower.
final_features runs/bench_base/clips4_again.safetensors
train experiment=bench_base
rm -f assets/bench/base.safetensors
$python scripts/save_weights.py --checkpoint runs/bench_base --out assets/bench/base.safetensors --dtype bf16
