#!/usr/bin/env bash
# All six steps on one machine with GPUs:
#
#     SOURCE=meta-llama/Meta-Llama-3-8B TEXT='/data/pile/**/*.jsonl.zst' launch/recipes/gpu.sh
#
# With more than one GPU, each matrix is split over all of them (TENSOR).
set -euo pipefail

: "${SOURCE:?name the weights: a folder, a hub id, gs://…}"
: "${TEXT:?name the text: a folder, a file or a glob}"
RUN=${RUN:-runs/gpu} PACKED=${PACKED:-packed/gpu} TENSOR=${TENSOR:-1} STEPS=${STEPS:-40000}
CONFIG="${CONFIG:-configs/llama3_8b.py}:source=$SOURCE,data=packed:$PACKED,steps=$STEPS"

python -m launch.tokenize --config="$CONFIG" --source="$TEXT" --packed="$PACKED"
python -m launch.tune --config="$CONFIG" --config.mesh.tensor="$TENSOR" --workdir="$RUN"
python -m launch.calibrate --workdir="$RUN"
python -m launch.evaluate --workdir="$RUN"
python -m launch.export --workdir="$RUN" --to="$RUN-exported"
