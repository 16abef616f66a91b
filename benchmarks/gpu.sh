#!/usr/bin/env bash
# What waits for a GPU, in parts that end within nine minutes; a part that was cut off goes on when it is called again.
#
#   DATA=CIFAR100 TEACHERS=DIR REFERENCE=CLONE OUT=DIR benchmarks/gpu.sh PART
#
# PART is, in this order: tests, reference, rows, more, step.
#   tests      the tests that need a GPU
#   reference  one step beside the reference code base (a clone of megvii-research/mdistiller)
#   step       the same at a batch size of 1,024
#   rows       resnet32x4 -> resnet8x4 of CIFAR-100: alone, KD and DKD, three seeds each, with the teacher's cache
#   more       the other pairs of docs/results/cifar100.md
#
# SMOKE=1 runs every part on a CPU with tiny models and few steps. The logs and run folders are in OUT.
set -euo pipefail
cd "$(dirname "$0")/.."
part=${1:?"which part? tests, reference, step, rows or more"}
OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-python} SMOKE=${SMOKE:-} LIMIT=${LIMIT:-530}
mkdir -p "$OUT"

limited() { # SIGTERM lets a run save its state
    timeout --signal=TERM --kill-after=15 "$LIMIT" "$@" 2>&1 | tee -a "$OUT/$part.log" || status=$?
    if [ "${status:-0}" = 124 ]; then echo "not done: call the part again"; else exit "${status:-0}"; fi
}

reproduce() {
    if [ -n "$SMOKE" ]; then
        limited "$PYTHON" -m mdistiller reproduce cifar100 --scale smoke --device cpu --seeds 1 --settings KD --images 0 \
            --out "$OUT/rows"
    else
        limited "$PYTHON" -m mdistiller reproduce cifar100 --out "$OUT/rows" --data-root "${DATA:?}" --teachers "${TEACHERS:?}" \
            --teacher-cache "$OUT/cache" --precision bfloat16 --compile default "$@"
    fi
}

case $part in
tests) limited "$PYTHON" -m pytest tests/training/test_gpu.py -q ;;
reference | step)
    if [ -n "$SMOKE" ]; then
        size=(--rounds 2 --steps 1 --pair resnet14 resnet8)
    elif [ "$part" = step ]; then
        size=(--rounds 6 --steps 40 --batch-size 1024 --compile default)
    else
        size=(--rounds 6 --steps 200 --compile default)
    fi
    limited "$PYTHON" benchmarks/compare_reference.py --reference "${REFERENCE:?}" --out "$OUT/$part" "${size[@]}"
    ;;
rows) reproduce --pairs resnet32x4_resnet8x4 --settings baseline KD DKD ;;
more) reproduce ;;
*)
    echo "unknown part '$part'; allowed: tests, reference, step, rows, more" >&2
    exit 2
    ;;
esac
