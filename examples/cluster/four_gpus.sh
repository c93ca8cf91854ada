#!/bin/bash
# One machine with 4 GPUs. A process that fails is started again up to 3 times, and the run goes on from its last checkpoint.
set -euo pipefail
export OMP_NUM_THREADS=8

torchrun --nproc-per-node 4 --max-restarts 3 -m rankwise train examples/cluster/four_gpus.yaml "$@"
