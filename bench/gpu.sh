#!/usr/bin/env bash
# One stage of the bench on one GPU, within nine minutes, and going on where it stopped:
#
#   bench/gpu.sh check       the GPU tests (kernels, engine, the clock); the other stages refuse to run unless they are green
#   bench/gpu.sh kernels     log-probs and policy losses beside their peers
#   bench/gpu.sh attention   attention beside torch's kernels and flash-attention
#   bench/gpu.sh step        one GRPO update, shared prefix against repeated prompts
#   bench/gpu.sh headline    one update of an 8B-shaped model with adapters at 16K to 120K, dense against shared
#   bench/gpu.sh with CMD..  any command in the same surroundings
#
# Needs torch, triton, transformers, numpy and pytest; the project need not be installed. Pure-Python peers are taken
# from bench/wheels (`make gpu-wheels`) where it exists. Results go to $OUT, else to bench/results. $PYTHON names the
# interpreter, $COMMIT the commit where there is no git; further arguments go to the stage (--shapes large).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
case ${1:-} in
    check | kernels | attention | step | headline | with) ;;
    *) sed -n '2,/^set/s/^#\( \|$\)//p' "$0" >&2; exit 2 ;;
esac

# The folders stand at the root and are imported as longreach.*; links give them that name without installing anything.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/longreach"
ln -s "$root/kernels" "$root/engine" "$work/longreach/"
ln -s "$root/bench" "$work/bench"
export PYTHONPATH=$work PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

for wheel in "$root"/bench/wheels/*-none-any.whl; do
    [ -e "$wheel" ] || continue
    "$python" -m zipfile -e "$wheel" "$work/site"
    export PYTHONPATH=$work:$work/site
done

# the longest prompts leave no room for a fragmented cache
if [ "$1" = headline ]; then export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}; fi

if [ "$1" = with ]; then
    shift
    "$@"
else
    # rows stand as soon as they are measured, so a stage that hangs costs no more than its time
    limit=()
    if command -v timeout >/dev/null; then limit=(timeout --signal=INT --kill-after=10 540); fi
    "${limit[@]}" "$python" -P -m bench.stage "$@" --out "${OUT:-$root/bench/results}" ${COMMIT:+--commit "$COMMIT"}
fi
