#!/usr/bin/env bash
# What is to be done on a machine with a GPU, and without a network: builds, tests, measures. Nothing is installed, and
# nothing is set on the device. Every part ends within eight minutes; one that fails does not stop the others.
set -uo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: benchmarks/run_gpu.sh FOLDER PART...
  build     the extension in place, with CUDA kernels; without them, loudly, where that fails
  test      the tests of the ops, on CUDA tensors too
  ops       emd-fast bench over the ops of the E-step and the losses, cold and warm
  sanitize  compute-sanitizer, memcheck and racecheck, over tests/test_cuda.py
  unet      emd-fast bench over group_norm and attention, in every shape that ADM-64 and Stable Diffusion 1.5 have
  blocks    the same over convolutions, in both memory formats, and whole residual blocks
  unet-adm, unet-sd15        the frozen forward pass, and a loop that is not ours
  e_step-adm, e_step-sd15    the E-step at K = 1, 8, 16; SHAPE=B,K in the environment is one of them, or another
  train     50 steps of ADM-64 and of Stable Diffusion 1.5, random weights: images/s, MFU, peak memory
FOLDER gets run.log, and PART.json of each part that measures (ops: ops-warm.json, ops.md and ops.png too).
TEXT
    exit 2
}

[ $# -ge 2 ] || usage
folder=$1
shift
for part in "$@"; do
    case $part in
        build | test | ops | sanitize | unet | blocks | unet-adm | unet-sd15 | e_step-adm | e_step-sd15 | train) ;;
        *)
            echo "run_gpu.sh: unknown part '$part'" >&2
            usage
            ;;
    esac
done

mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
log=$folder/run.log

# What PyTorch does not see, nothing here can use.
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "run_gpu.sh: no GPU is here ($python sees none through torch.cuda): nothing was run" | tee -a "$log" >&2
    exit 1
fi

seconds_a_part=470
deadline=0

# Runs a command within what is left of the part, or within the number of seconds given as --at-most.
step() {
    local left=$((deadline - SECONDS))
    if [ "$1" = --at-most ]; then
        [ "$2" -lt "$left" ] && left=$2
        shift 2
    fi
    if [ "$left" -le 0 ]; then
        echo "no time is left for: $*"
        return 1
    fi
    echo "+ $*"
    # Interrupted, as from a keyboard, pytest still says what has failed until then.
    timeout --signal=INT --kill-after=10 "$left" "$@"
    local code=$?
    [ $code -eq 124 ] && echo "stopped after $left s: $*"
    return $code
}

bench() {
    step "$python" -m emd_fast bench --device cuda "$@"
}

build() {
    EMD_FAST_BUILD=cuda step "$python" setup.py build_ext --inplace && return 0
    echo "*** THE BUILD WITH CUDA KERNELS FAILED; building the CPU kernels alone ***"
    EMD_FAST_BUILD=cpu step "$python" setup.py build_ext --inplace
    return 1
}

tests() {
    local files=()
    for op in cuda uniform normal perturb langevin_eps langevin_z m_step_loss score_matching_loss group_norm attention \
        integers triton triton_compile backends native bench bench_command bench_gpu; do
        if [ -e "tests/test_$op.py" ]; then
            files+=("tests/test_$op.py")
        else
            echo "there is no tests/test_$op.py"
        fi
    done
    # A kernel that Triton compiles takes a second or two of one core, and there are hundreds of them.
    local workers=()
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
    step "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" "${files[@]}"
}

ops() {
    local emd=(uniform normal perturb langevin_eps langevin_z langevin_step m_step_loss score_matching_loss) failed=0
    step --at-most 340 "$python" -m emd_fast bench --device cuda "${emd[@]}" --skip "emd_fast reference" \
        --json "$folder/ops.json" --markdown "$folder/ops.md" --plot "$folder/ops.png" || failed=1
    bench "${emd[@]}" --skip "emd_fast reference" --shape 64,3,64,64 --warm --json "$folder/ops-warm.json" || failed=1
    return $failed
}

sanitize() {
    local failed=0
    if ! command -v compute-sanitizer; then
        echo "compute-sanitizer is not on the PATH"
        return 1
    fi
    if ! [ -e tests/test_cuda.py ]; then
        echo "there is no tests/test_cuda.py"
        return 1
    fi
    # Of Triton's kernels two shapes: the sanitizer makes every launch a hundred times as long.
    local chosen="[cuda-shape or [triton-shape3 or [triton-shape6 or group_norm[shape3"
    for tool in memcheck racecheck; do
        # Without PyTorch's cache every tensor is an allocation of its own, whose ends are seen.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step --at-most 230 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -q -p no:cacheprovider -k "$chosen" tests/test_cuda.py || failed=1
    done
    return $failed
}

unet() {
    bench group_norm attention --skip "emd_fast reference" --json "$folder/unet.json"
}

blocks() {
    bench convolution residual_block --layout nhwc --json "$folder/blocks.json"
    local nhwc=$?
    bench convolution --json "$folder/convolution-nchw.json" && return $nhwc
}

forward() {
    bench "unet:$1" "loop:$1" --rounds 20 --json "$folder/unet-$1.json"
}

e_step() {
    # Most of the time is compilation: one shape a call where three are too many.
    bench "e_step:$1" ${SHAPE:+--shape "$SHAPE"} --rounds 10 --json "$folder/e_step-$1.json"
}

train() {
    # A little less than the part has: the steps end by themselves, and what was seen of them is written.
    step "$python" -m benchmarks.train adm sd15 --device cuda --seconds $((seconds_a_part - 30)) --json "$folder/train.json"
}

summary=()
failed=0
for part in "$@"; do
    began=$SECONDS
    deadline=$((SECONDS + seconds_a_part))
    case $part in
        test) name=(tests) ;; # test is a command of the shell
        unet-*) name=(forward "${part#unet-}") ;;
        e_step-*) name=(e_step "${part#e_step-}") ;;
        *) name=("$part") ;;
    esac
    echo "=== $part ===" | tee -a "$log"
    "${name[@]}" 2>&1 | tee -a "$log"
    if [ "${PIPESTATUS[0]}" -eq 0 ]; then
        result=ok
    else
        result=FAILED
        failed=1
    fi
    summary+=("$(printf '%-11s %-7s %4d s' "$part" "$result" $((SECONDS - began)))")
done

{
    echo
    echo "=== results ==="
    files=()
    for file in ops ops-warm unet blocks convolution-nchw unet-adm unet-sd15 e_step-adm e_step-sd15 train; do
        [ -e "$folder/$file.json" ] && files+=("$folder/$file.json")
    done
    printf '%s\n' "${summary[@]}"
    if [ ${#files[@]} -gt 0 ]; then
        "$python" -m benchmarks.harness.digest "${files[@]}"
    fi
} 2>&1 | tee -a "$log"
exit $failed
