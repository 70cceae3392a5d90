#!/usr/bin/env bash
# What needs a GPU, in order of worth, in eight minutes on a machine with one and 16 cores:
#
#   1. EVA's initialisation of a Llama-shaped model of 1B random weights, ours and peft's
#   2. the paper preset, 12 million parameters, pretrained on MT40 with 512 windows a batch in bfloat16
#   3. the GPU's columns of the training and the rollout table
#   4. EVA's initialisation of the small and the paper preset
#
#   benchmarks/gpu.sh             everything goes to $OUT, or to build/gpu/
#   SMOKE=1 benchmarks/gpu.sh     the same on the CPU, in small, in a minute or two
#
# It uses $PYTHON, or .venv/ where that is, or else a python3 that has torch and peft, and what that lacks from the wheels in .whl/ or $WHEELS,
# so that no package index is needed. Where there is one, `make setup` comes first. A part that fails or takes too long is noted in log.txt,
# and the next one goes on. What comes back is in few files of at most 15 MB: log.txt, tables.md, and the model's folder in
# mt40-paper.tar.* (`cat mt40-paper.tar.* | tar x -C checkpoints`).
set -u
cd "$(dirname "$0")/.."
START=$SECONDS
LIMIT=${LIMIT:-480}          # seconds for all
OUT=${OUT:-build/gpu}
WORK=${WORK:-$(mktemp -d)}
WHEELS=${WHEELS:-.whl}
SMOKE=${SMOKE:-}
mkdir -p "$OUT" "$WORK/tables"
OUT=$(cd "$OUT" && pwd)
LOG=$OUT/log.txt
: > "$LOG"

say() { echo "[$((SECONDS - START)) s] $*" | tee -a "$LOG"; }

python_of() {
    if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"
    elif [ -x .venv/bin/python ]; then echo "$PWD/.venv/bin/python"
    elif python3 -c 'import torch, peft' 2> /dev/null; then command -v python3
    else make setup >> "$LOG" 2>&1 && echo "$PWD/.venv/bin/python"
    fi
}

# part NAME SECONDS COMMAND...: run it for so long at most, and no longer than is left.
part() {
    local name=$1 most=$2 left=$((LIMIT - SECONDS + START - 15))
    shift 2
    [ -n "$SMOKE" ] || [ "$left" -lt "$most" ] && most=$left
    if [ "$most" -lt 10 ]; then say "$name: no time is left"; return 1; fi
    local began=$SECONDS code=0
    timeout "$most" "$@" >> "$WORK/$name.log" 2>&1 || code=$?
    say "$name: $([ $code = 0 ] && echo done || echo "ended with $code") after $((SECONDS - began)) s"
    [ $code = 0 ] || tail -n 15 "$WORK/$name.log" >> "$LOG"
    return $code
}

# gather: what there is so far, into $OUT; after each part, so that nothing is lost where the machine is taken away.
gather() {
    cat "$WORK"/tables/*.md > "$OUT/tables.md" 2> /dev/null
    if [ -e "$WORK/mt40-paper/model.safetensors" ]; then
        rm -f "$OUT"/mt40-paper.tar.*
        tar c -C "$WORK" mt40-paper | split -b 15M - "$OUT/mt40-paper.tar."
    fi
}

PYTHON=$(python_of)
[ -n "$PYTHON" ] || { say "no Python with torch and peft"; exit 1; }
if ls "$WHEELS"/*.whl > /dev/null 2>&1; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$WORK/site" "$WHEELS"/*.whl >> "$LOG" 2>&1
fi
export PYTHONPATH=$PWD:$WORK/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export MINARI_DATASETS_PATH=${MINARI_DATASETS_PATH:-$WORK/minari}
mkdir -p "$MINARI_DATASETS_PATH"
say "$("$PYTHON" -c 'import sys, torch, peft
print(sys.version.split()[0], "torch", torch.__version__, "peft", peft.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")')"

if [ -n "$SMOKE" ]; then
    DEVICE=cpu MODEL=llama-tiny LANGUAGE="--ranks 4 --rhos 2 --batches 6 --cap 20"
    PRESETS=small INIT="--ranks 4 --rhos 1 --repeats 1"
    TASK=metaworld/reach-v3 DATA=2 PRETRAIN="model=tiny steps=2 training.batch_size=8 training.warmup=1 training.log_every=1"
    TRAINING="--presets small --repeats 1" ROLLOUT="--presets small --episodes 2 --workers 1 --repeats 1"
else
    DEVICE=cuda MODEL=llama-1b LANGUAGE="--ranks 16 --rhos 2 --batches 32 --cap 120"
    PRESETS="small paper" INIT="--ranks 16 --rhos 2 --repeats 1"
    TASK=metaworld/mt40 DATA=${DATA:-100} PRETRAIN="model=paper steps=${STEPS:-6000} training.batch_size=512 training.precision=bfloat16"
    TRAINING="--presets small paper --repeats 5" ROLLOUT="--presets small paper --episodes 32 --repeats 1"
fi

part "init-$MODEL" 200 "$PYTHON" -m benchmarks.language_model --model $MODEL $LANGUAGE --device $DEVICE --results "$WORK/tables"
gather
if part collect 120 "$PYTHON" -m eva_rl.collect task=$TASK episodes=$DATA; then
    part pretrain 200 "$PYTHON" -m eva_rl.pretrain task=$TASK "model.tokens=[state]" labels=expert task_vectors=true \
        demonstrations=$DATA device=$DEVICE $PRETRAIN run_dir="$WORK/run" output="$WORK/mt40-paper"
    gather
fi
part training 60 "$PYTHON" -m benchmarks.training $TRAINING --device $DEVICE --results "$WORK/tables"
gather
part rollout 100 "$PYTHON" -m benchmarks.rollout $ROLLOUT --device $DEVICE --results "$WORK/tables"
gather
if [ -z "$SMOKE" ]; then
    for preset in $PRESETS; do
        part "init-$preset" 100 "$PYTHON" -m benchmarks.eva_init --preset "$preset" $INIT --device $DEVICE --results "$WORK/tables"
    done
fi
gather
say "everything is in $OUT: $(ls "$OUT" | tr '\n' ' ')"
