#!/bin/sh
# Trains a recipe on one machine, with vLLM's servers (make vllm) on some of its GPUs and the trainer on the others:
#
#     TRAIN=0,1,2,3 SERVE="4,5 6,7" sh examples/torchrun_with_vllm.sh RECIPE [--run-dir DIR] [--section.key VALUE ...]
#
# SERVE has a word for each server: the GPUs that it spreads the model over (tensor parallelism), as nvidia-smi numbers them.
# Several servers of few GPUs send less between GPUs than one of many, as long as the model with a group's keys and values fits;
# `longreach plan` says whether. Prompts of one document meet again at one server. New weights go there through the run folder, or from GPU to GPU with
# --generator.sync.kind nccl. The same command resumes. Without a GPU leave both out: one server computes on the CPU, too.
set -eu
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
if [ -n "${SERVE-}" ]; then
	devices=$(printf '"%s",' $SERVE)
	spread=$(printf '%s' "${SERVE%% *}" | tr ',' '\n' | grep -c .)
	export CUDA_VISIBLE_DEVICES="$TRAIN"
	set -- "$@" --generator.servers "$(printf '%s\n' $SERVE | grep -c .)" --generator.devices "[${devices%,}]" \
		--generator.args="--tensor-parallel-size,$spread"
fi
exec torchrun --standalone --nproc-per-node "${NPROC:-gpu}" -m longreach.rl.cli train "$@" --generator vllm
