#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU; needs no internet connection. Installs nothing and changes no
# setting of the device. Every part ends within eight minutes. A part that fails does not stop the others.
set -uo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: benchmarks/run_gpu.sh FOLDER PART...
  build     builds the extension in place with CUDA kernels; if that fails, with CPU kernels only
  test      tests of the ops, including those on CUDA tensors
  ops       emd-fast bench of the E-step ops and the losses, cold and warm
  sanitize  compute-sanitizer (memcheck and racecheck) on tests/test_cuda.py
  unet      emd-fast bench of group_norm and attention at all shapes of ADM-64 and Stable Diffusion 1.5
  blocks    emd-fast bench of convolutions in both memory formats, and of residual blocks
  unet-adm, unet-sd15        frozen forward pass, and a training step in a plain PyTorch loop
  e_step-adm, e_step-sd15    E-step at K = 1, 8, 16; the variable SHAPE=B,K selects one shape instead
  train     50 steps of ADM-64 and of Stable Diffusion 1.5, random weights: images/s, MFU, peak memory
Writes to FOLDER: run.log, and PART.json for each part that measures (ops: also ops-warm.json, ops.md, ops.png).
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
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
log=$folder/run.log

# All parts use the GPU through PyTorch.
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "run_gpu.sh: no GPU is here ($python sees none through torch.cuda): nothing was run" | tee -a "$log" >&2
    exit 1
fi

seconds_a_part=470
deadline=0

# Runs a command with the remaining time of the part as its limit; --at-most SECONDS lowers the limit.
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
    # SIGINT lets pytest print the failures so far.
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
    for op in cuda noise bad_input perturb langevin_eps langevin_z m_step_loss score_matching_loss group_norm attention \
        triton triton_compile backends native bench bench_command bench_gpu; do
        if [ -e "tests/test_$op.py" ]; then
            files+=("tests/test_$op.py")
        else
            echo "there is no tests/test_$op.py"
        fi
    done
    # Triton compiles hundreds of kernels, one or two seconds each on one core.
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
    # Only two shapes of the Triton kernels: the sanitizer slows every launch by a factor of about 100.
    local chosen="[cuda-shape or [triton-shape3 or [triton-shape6 or group_norm[shape3"
    for tool in memcheck racecheck; do
        # Without PyTorch's caching allocator every tensor is a separate allocation, whose bounds memcheck checks.
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
    # Compilation takes most of the time. SHAPE selects one shape if three take too long.
    bench "e_step:$1" ${SHAPE:+--shape "$SHAPE"} --rounds 10 --json "$folder/e_step-$1.json"
}

train() {
    # 30 s less than the limit of the part, so that training ends by itself and writes its results.
    step "$python" -m benchmarks.train adm sd15 --device cuda --seconds $((seconds_a_part - 30)) --json "$folder/train.json"
}

summary=()
failed=0
for part in "$@"; do
    began=$SECONDS
    deadline=$((SECONDS + seconds_a_part))
    case $part in
        test) name=(tests) ;; # `test` is a shell builtin
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
