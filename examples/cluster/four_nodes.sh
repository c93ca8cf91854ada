#!/bin/bash
# The same on each of 4 machines, without a scheduler: `bash examples/cluster/four_nodes.sh HOST`, HOST being one of them.
set -euo pipefail
head=${1:?usage: four_nodes.sh HOST}
export OMP_NUM_THREADS=8

torchrun \
    --nnodes 4 \
    --nproc-per-node 8 \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head:29500" \
    --rdzv-id four-nodes \
    --max-restarts 3 \
    --shutdown-timeout 240 \
    -m rankwise train examples/cluster/four_nodes.yaml --resume
