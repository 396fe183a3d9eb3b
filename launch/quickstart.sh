#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From nothing to a trained model: install, corpus, tokenizer, data, training, loss curve, sample.
#
#   ./launch/quickstart.sh            run it, or resume it from its last checkpoint
#   ./launch/quickstart.sh --fresh    start over
#   ./launch/quickstart.sh --short    a run of a few steps that shows that everything works
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

fresh=false short=false
for argument in "$@"; do
    case "$argument" in
    --fresh) fresh=true ;;
    --short) short=true ;;
    -h | --help) sed -n '3,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    *) fail "$argument: unknown flag; the flags are --fresh and --short" ;;
    esac
done

begun=$SECONDS
ensure_installed ""
installed=$SECONDS

run=runs/quickstart
steps=()
if $short; then
    run=runs/quickstart-short
    steps=(--train-iters 12 --lr-warmup-iters 2 --eval-interval 6 --eval-iters 1 --save-interval 6)
fi
if $fresh; then rm -rf "$run"; fi
mkdir -p "$run" || fail "cannot create $run; check the permissions of this folder"

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -ge 2 ]; then
    processes=2 config=examples/configs/small_gpu.yaml parallel=()
elif [ "$gpus" -eq 1 ]; then
    processes=1 config=examples/configs/small_gpu.yaml
    parallel=(--tensor-model-parallel-size 1 --no-sequence-parallel)
else
    processes=2 config=examples/configs/tiny_cpu.yaml parallel=()
fi

if [ ! -f "$run/data/python_valid.idx" ]; then
    python examples/prepare_data.py --python-stdlib --validation-fraction 0.05 \
        --train-tokenizer --vocab-size 2048 --tokenizer-model "$run/data/tokenizer.model" \
        --output-prefix "$run/data/python" --overwrite
fi

python examples/pretrain_gpt.py --nproc-per-node "$processes" --config "$config" "${parallel[@]}" "${steps[@]}" \
    --tokenizer-model "$run/data/tokenizer.model" \
    --train-data-path "$run/data/python_train" --valid-data-path "$run/data/python_valid" \
    --save "$run" --load "$run"

echo "--- a sample from the checkpoint"
python examples/generate.py --load "$run" --prompt $'    def __init__(self' \
    --max-new-tokens 40 --temperature 0.7 --top-k 20
echo "---"
echo "loss curve: $run/loss_curve.png   TensorBoard: tensorboard --logdir $run/tensorboard"
echo "done in $((SECONDS - begun)) s, of which $((installed - begun)) s installing; run it again to resume"
