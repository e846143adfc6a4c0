#!/usr/bin/env bash
# The runs of a config's sweep on TPU slices of GKE, as JobSets:
#
#     CONFIG=configs/mine.py IMAGE=gcr.io/… CLAIM=runs RUN=/mnt/runs/a launch/recipes/gke.sh
#
# RUN lies on a volume that outlives the pods (CLAIM), under the same path here and there; Kubernetes
# restarts what was preempted, and the run goes on. Given again at the end, it gathers the results.
set -euo pipefail

: "${CONFIG:?name a config with a sweep(add)}" "${IMAGE:?name a container}" "${CLAIM:?name a claim}"
: "${RUN:?name a folder on the volume of the claim}"
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} SLICE=${SLICE:-4x4} CHIPS=${CHIPS:-4}

python -m launch.sweep --config="$CONFIG" --workdir="$RUN" --engine=gke --image="$IMAGE" \
    --claim="$CLAIM" --accelerator="$ACCELERATOR" --slice="$SLICE" --chips="$CHIPS" \
    ${APPLY:+--apply}
