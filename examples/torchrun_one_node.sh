#!/bin/sh
# Trains a recipe on all GPUs of one machine:
#
#     sh examples/torchrun_one_node.sh RECIPE [--run-dir DIR] [--section.key VALUE ...]
#
# NPROC is the number of processes (default: one for each GPU). The same command resumes, also with another NPROC.
# Ctrl-C once finishes the step and saves it: torchrun waits so many seconds for that before it kills.
set -eu
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec torchrun --standalone --nproc-per-node "${NPROC:-gpu}" -m longreach.rl.cli train "$@"
