#!/usr/bin/env bash
# Tuning on a slice of TPUs of one's own, which is made, used to the end, and deleted:
#
#     BUCKET=gs://mine ZONE=us-west4-a SOURCE=gs://mine/llama3 REPOSITORY=https://… \
#         launch/recipes/tpu_vm.sh
#
# The run is in the bucket: when the slice is taken away, another goes on. The packed text is copied
# to each host; where the disks are too small for it, mount the bucket (gcsfuse) and name the folder.
set -euo pipefail

: "${BUCKET:?name a bucket, gs://…}" "${ZONE:?name a zone, such as us-west4-a}"
: "${SOURCE:?name the weights: a hub id or a folder in the bucket}"
: "${REPOSITORY:?name what git clones onto the hosts}"
NAME=${NAME:-exits} TYPE=${TYPE:-v5litepod-16} RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
RUN=${RUN:-$BUCKET/runs/tpu_vm} PACKED=${PACKED:-$BUCKET/packed/text} STEPS=${STEPS:-40000}
CONFIG="${CONFIG:-configs/llama3_8b.py}:source=$SOURCE,data=packed:$PACKED,steps=$STEPS"
HERE=early_exit

pod() {
    python -m launch.tpu.pod "$1" --name="$NAME" --zone="$ZONE" --type="$TYPE" \
        --runtime="$RUNTIME" --spot \
        --setup="git clone $REPOSITORY $HERE && pip install -e '$HERE[tpu,gs]'" "${@:2}"
}

# Text is packed where the disks and the processors are, before any TPU waits for it.
if [ -n "${TEXT:-}" ]; then
    python -m launch.tokenize --config="$CONFIG" --source="$TEXT" --packed="$PACKED"
fi
pod run -- "cd $HERE && python -m launch.tune --multihost --config=$CONFIG --workdir=$RUN"
pod delete
