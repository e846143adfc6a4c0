#!/usr/bin/env bash
# The same on the GPUs of a Slurm cluster; one job after the other, tuning on several nodes:
#
#     SOURCE=/models/llama3 TEXT=/data/pile NODES=4 launch/recipes/slurm_gpu.sh
#
# A job whose time is up, or whose nodes are wanted back, queues again and goes on. --workdir and
# the text are on a disk that all nodes see.
set -euo pipefail

: "${SOURCE:?name the weights: a folder that all nodes see, or a hub id}"
: "${TEXT:?name the text: a folder, a file or a glob}"
RUN=${RUN:-runs/slurm} PACKED=${PACKED:-packed/slurm} STEPS=${STEPS:-40000}
NODES=${NODES:-2} GPUS=${GPUS:-8} TENSOR=${TENSOR:-8} TIME=${TIME:-8:00:00}
CONFIG="${CONFIG:-configs/llama3_8b.py}:source=$SOURCE,data=packed:$PACKED,steps=$STEPS"
JOB="$(dirname "$0")/../slurm/run.sbatch"

# One process a GPU; Slurm tells each which one it is.
queue() {
    sbatch --parsable --time="$TIME" "$@"
}

packed=$(queue --cpus-per-task=64 "$JOB" \
    python -m launch.tokenize --config="$CONFIG" --source="$TEXT" --packed="$PACKED")
tuned=$(queue --dependency="afterok:$packed" \
    --nodes="$NODES" --ntasks-per-node="$GPUS" --gpus-per-node="$GPUS" "$JOB" \
    python -m launch.tune --config="$CONFIG" --config.mesh.tensor="$TENSOR" --workdir="$RUN")
calibrated=$(queue --dependency="afterok:$tuned" --gpus=1 "$JOB" \
    python -m launch.calibrate --workdir="$RUN")
queue --dependency="afterok:$calibrated" --gpus=1 "$JOB" \
    python -m launch.export --workdir="$RUN" --to="$RUN-exported"
