#!/usr/bin/env bash
# One run on a TPU slice of GKE by xpk, which writes the JobSet itself; the run is in a bucket:
#
#     BUCKET=gs://mine CLUSTER=exits SOURCE=gs://mine/llama3 IMAGE=gcr.io/… launch/recipes/xpk.sh
set -euo pipefail

: "${BUCKET:?name a bucket, gs://…}" "${CLUSTER:?name a cluster that xpk has made}"
: "${SOURCE:?name the weights: a hub id or a folder in the bucket}" "${IMAGE:?name a container}"
RUN=${RUN:-$BUCKET/runs/xpk} PACKED=${PACKED:-$BUCKET/packed/text} STEPS=${STEPS:-40000}
CONFIG="${CONFIG:-configs/llama3_8b.py}:source=$SOURCE,data=packed:$PACKED,steps=$STEPS"

xpk workload create --cluster="$CLUSTER" --workload="${NAME:-exits}" \
    --tpu-type="${TYPE:-v5litepod-16}" --num-slices=1 --max-restarts=3 --docker-image="$IMAGE" \
    --command="python -m launch.tune --multihost --config=$CONFIG --workdir=$RUN"
