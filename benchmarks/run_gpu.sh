#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU; needs no internet connection. Changes no setting of the device.
# Every part ends within eight minutes. A part that fails, or that lacks something, does not stop the others.
set -uo pipefail

usage() {
    cat >&2 <<'TEXT'
usage: benchmarks/run_gpu.sh FOLDER PART...
  call-1    info build smoke headline: the first numbers, in 450 s
  call-2    convolution profile attention, in 210 s
  info      versions, and the backend of every op
  build     keeps a built extension that runs CUDA kernels here; otherwise builds it for the chip of this machine, and
            with CPU kernels only if that fails
  smoke     tests/test_cuda.py, at most 90 s
  test      the test files that need a GPU
  headline  headline-kernels (group_norm NHWC at the four shapes of ADM, normal, langevin_step),
            headline-adm, headline-sd15 (E-step at K = 2)
  profile   profile-adm, profile-sd15: kernel time of the E-step by class
  ops       emd-fast bench of the E-step ops and the losses, cold and warm
  sanitize  compute-sanitizer (memcheck and racecheck) on tests/test_cuda.py
  unet      group_norm (NHWC, as fuse runs it), attention: at all shapes of ADM-64 and Stable Diffusion 1.5
  blocks    convolution, residual_block (NHWC)
  unet-adm, unet-sd15        frozen forward pass, and a training step in a plain PyTorch loop
  e_step-adm, e_step-sd15    E-step at K = 2 at two batches; the variable SHAPE=B,K selects one shape instead
  train     50 steps of ADM-64 and of Stable Diffusion 1.5, random weights: images/s, MFU, peak memory
  study     cells a and b of the study of Fashion-MNIST at 28x28, one seed, then a second as far as the time goes
Variables:
  FULL=1        also contenders that torch.compile makes, which compile for minutes, and group_norm in NCHW
  WHEELS=DIR    wheels of packages that are not installed here; they are unpacked for this run alone
  DATA=DIR      the four files of Fashion-MNIST, for study (default EMD_FAST_FASHION, or Debian's folder)
  LIMIT=N       seconds for all parts together
  DRY=1         runs every part on the CPU with small networks and tensors, as a check of this script
  PYTHON=NAME   the Python to use (default python3)
Writes to FOLDER: run.log, and PART.json for each part that measures (ops: also ops-warm.json, ops.md, ops.png;
study: study.json and study.md). The runs of study stay in runs/gpu-study of the checkout: a second call goes on there.
TEXT
    exit 2
}

[ $# -ge 2 ] || usage
folder=$1
shift
limit=${LIMIT:-86400}
parts=()
for part in "$@"; do
    case $part in
        call-1)
            limit=${LIMIT:-450}
            parts+=(info build smoke headline-kernels headline-adm headline-sd15)
            ;;
        call-2)
            limit=${LIMIT:-210}
            parts+=(convolution profile-adm profile-sd15 attention)
            ;;
        headline) parts+=(headline-kernels headline-adm headline-sd15) ;;
        profile) parts+=(profile-adm profile-sd15) ;;
        unet) parts+=(group_norm attention) ;;
        blocks) parts+=(convolution residual_block) ;;
        info | build | smoke | test | ops | sanitize | group_norm | attention | convolution | residual_block | train | \
            study | headline-kernels | headline-adm | headline-sd15 | profile-adm | profile-sd15 | \
            unet-adm | unet-sd15 | e_step-adm | e_step-sd15) parts+=("$part") ;;
        *)
            echo "run_gpu.sh: unknown part '$part'" >&2
            usage
            ;;
    esac
done

wheels=${WHEELS:+$(cd "$WHEELS" 2>/dev/null && pwd)}
if [ -n "${WHEELS:-}" ] && [ -z "$wheels" ]; then
    echo "run_gpu.sh: there is no folder WHEELS=$WHEELS" >&2
    exit 2
fi
if [ -n "${DATA:-}" ]; then
    EMD_FAST_FASHION=$(cd "$DATA" 2>/dev/null && pwd) || { echo "run_gpu.sh: there is no folder DATA=$DATA" >&2; exit 2; }
    export EMD_FAST_FASHION
fi
mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd) || exit 1
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
log=$folder/run.log
device=cuda
[ "${DRY:-}" = 1 ] && device=cpu

scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$scratch/site" \
        "$wheels"/*.whl || exit 1
    PYTHONPATH=$PYTHONPATH:$scratch/site
fi

lacking=$("$python" benchmarks/preflight.py "${parts[@]}")
code=$?
if [ $code -ge 2 ] || { [ $code -ne 0 ] && [ -z "$lacking" ]; }; then
    { [ -n "$lacking" ] && sed 's/^/run_gpu.sh: /' <<<"$lacking"; echo "run_gpu.sh: nothing was run"; } | tee -a "$log" >&2
    exit 1
fi
[ -n "$lacking" ] && echo "$lacking" | tee -a "$log"

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
        return 124
    fi
    echo "+ $*"
    # SIGINT lets pytest print the failures so far, and the benchmarks keep what they have written.
    timeout --signal=INT --kill-after=10 "$left" "$@"
    local code=$?
    [ $code -eq 124 ] && echo "stopped after $left s: $*"
    return $code
}

# bench SHAPE WORD...: emd-fast bench of these words. If DRY=1, of SHAPE and the small network instead.
bench() {
    local small=$1 words=() limit=()
    shift
    if [ "$1" = --at-most ]; then
        limit=("$1" "$2")
        shift 2
    fi
    if [ $device = cpu ]; then
        while [ $# -gt 0 ]; do
            case $1 in
                --shape) shift ;;
                *:adm | *:sd15) words+=("${1%:*}:small") ;;
                *) words+=("$1") ;;
            esac
            shift
        done
        set -- "${words[@]}" --shape "$small" --rounds 2 --warm
    fi
    step "${limit[@]}" "$python" -m emd_fast bench --device $device "$@"
}

# Contenders that compile for minutes take part if they are asked for.
quick=(--no-compile)
[ "${FULL:-}" = 1 ] && quick=()

info() {
    step --at-most 60 "$python" -m emd_fast info
}

build() {
    if [ $device = cpu ]; then
        EMD_FAST_BUILD=none step "$python" setup.py build_ext --build-lib "$scratch" --build-temp "$scratch"
        return
    fi
    local draws='
import torch, emd_fast
with emd_fast.use_backend("cuda"):
    print(float(emd_fast.ops.normal((2, 64), emd_fast.Noise(0, device="cuda"), stream=0).square().mean()))'
    if step --at-most 60 "$python" -c "$draws"; then
        echo "the extension that is here runs CUDA kernels: nothing is built"
        return 0
    fi
    local chip
    chip=$("$python" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())' 2>/dev/null)
    export EMD_FAST_CUDA_ARCHITECTURES=${EMD_FAST_CUDA_ARCHITECTURES:-${chip:-90-real}}
    EMD_FAST_BUILD=cuda step "$python" setup.py build_ext --inplace && return 0
    echo "*** THE BUILD WITH CUDA KERNELS FAILED; building the CPU kernels alone ***"
    EMD_FAST_BUILD=cpu step "$python" setup.py build_ext --inplace
    return 1
}

# tests WORD...: pytest of these files. On a CPU each of them skips itself, which pytest reports as code 5.
tests() {
    local limit=() workers=()
    if [ "$1" = --at-most ]; then
        limit=("$1" "$2")
        shift 2
    fi
    # Triton compiles hundreds of kernels, one or two seconds each on one core.
    [ $device = cuda ] && "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
    step "${limit[@]}" "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" "$@"
    local code=$?
    [ $device = cpu ] && [ $code -eq 5 ] && return 0
    return $code
}

smoke() {
    tests --at-most 90 tests/test_cuda.py
}

all_tests() {
    local files=()
    mapfile -t files < <(grep -l '^    pytest.skip("no GPU", allow_module_level=True)' tests/test_*.py)
    tests "${files[@]}"
}

headline_kernels() {
    local failed=0
    bench 2,32,8,8 --at-most 120 group_norm --layout nhwc --shape 16,192,64,64 --shape 16,384,32,32 \
        --shape 16,576,16,16 --shape 16,768,8,8 --skip "emd_fast reference" --rounds 30 \
        --json "$folder/headline-group_norm.json" || failed=1
    bench 2,4,8,8 --at-most 60 normal langevin_step --skip "emd_fast reference" --rounds 30 \
        --json "$folder/headline-ops.json" || failed=1
    return $failed
}

headline_e_step() {
    local shape
    [ "$1" = adm ] && shape=16,2 || shape=4,2
    bench 2,2 --at-most 150 "e_step:$1" --shape $shape --no-compile --rounds 10 --json "$folder/headline-$1.json"
}

profile() {
    local network=$1 batch
    [ "$1" = adm ] && batch=16 || batch=4
    [ $device = cpu ] && network=small batch=2
    step --at-most 120 "$python" -m benchmarks.profile $network --batch $batch --device $device \
        --json "$folder/profile-$1.json"
}

ops() {
    local emd=(uniform normal perturb langevin_eps langevin_z langevin_step m_step_loss score_matching_loss) failed=0
    bench 2,4,8,8 --at-most 340 "${emd[@]}" --skip "emd_fast reference" \
        --json "$folder/ops.json" --markdown "$folder/ops.md" --plot "$folder/ops.png" || failed=1
    bench 2,4,8,8 "${emd[@]}" --skip "emd_fast reference" --shape 64,3,64,64 --warm --json "$folder/ops-warm.json" ||
        failed=1
    return $failed
}

sanitize() {
    # Only two shapes of the Triton kernels: the sanitizer slows every launch by a factor of about 100.
    local chosen="[cuda-shape or [triton-shape3 or [triton-shape6 or group_norm[shape3" failed=0
    for tool in memcheck racecheck; do
        # Without PyTorch's caching allocator every tensor is a separate allocation, whose bounds memcheck checks.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step --at-most 230 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -q -p no:cacheprovider -k "$chosen" tests/test_cuda.py || failed=1
    done
    return $failed
}

# fuse() runs networks on a GPU in channels_last.
group_norm() {
    bench 2,32,8,8 group_norm --layout nhwc "${quick[@]}" --skip "emd_fast reference" --json "$folder/group_norm.json"
    local nhwc=$?
    [ "${FULL:-}" = 1 ] || return $nhwc
    bench 2,32,8,8 group_norm --skip "emd_fast reference" --json "$folder/group_norm-nchw.json" && return $nhwc
}

attention() {
    bench 2,16,2,8 attention "${quick[@]}" --skip "emd_fast reference" --rounds 30 --json "$folder/attention.json"
}

convolution() {
    bench 2,32,8,8 convolution --layout nhwc "${quick[@]}" --rounds 20 --json "$folder/convolution.json"
}

residual_block() {
    bench 2,32,8,8 residual_block --layout nhwc "${quick[@]}" --rounds 20 --json "$folder/residual_block.json"
}

forward() {
    bench 2 "unet:$1" "loop:$1" "${quick[@]}" --rounds 20 --json "$folder/unet-$1.json"
}

e_step() {
    bench 2,2 "e_step:$1" ${SHAPE:+--shape "$SHAPE"} "${quick[@]}" --rounds 10 --json "$folder/e_step-$1.json"
}

train() {
    # 30 s less than the limit of the part, so that training ends by itself and writes its results.
    local words=(adm sd15 --seconds $((deadline - SECONDS - 30)))
    [ $device = cpu ] && words=(small --seconds 60 --steps 1 --batch 2 --langevin-steps 1)
    step "$python" -m benchmarks.train "${words[@]}" --device $device --json "$folder/train.json"
}

# The time of a run is mostly that of launches, so 128 samples cost little more than the 64 of the recipe.
study() {
    local work=runs/gpu-study code=0 file
    local words=(--resolution 28 --teacher.steps 8000 --steps 400 --batch-size 128)
    if [ $device = cpu ]; then
        work=$scratch
        words=(--resolution 28 --teacher.channels 4 --teacher.steps 2 --steps 2 --batch-size 4)
        words+=(--fashion.classifier_steps 2)
        local -x CUDA_VISIBLE_DEVICES=
    fi
    local -x EMD_FAST_CACHE=$work/cache
    # Networks this small gain little from bfloat16, and the figures are those of float32 elsewhere.
    words=(study fashion --cells a,b "${words[@]}" --precision float32 --out "$work/study")
    # Seed 0 of all variants comes first. That the time ends seed 1 is no failure.
    step "$python" -m emd_fast "${words[@]}" --seeds 1 || code=$?
    if [ $code -eq 0 ] && [ $device = cuda ]; then
        step "$python" -m emd_fast "${words[@]}" --seeds 2 || code=$?
        [ $code -eq 124 ] && code=0
    fi
    # The study writes both after each run.
    for file in study.json study.md; do
        [ -e "$work/study/$file" ] && cp "$work/study/$file" "$folder/"
    done
    return $code
}

summary=()
failed=0
for part in "${parts[@]}"; do
    began=$SECONDS
    deadline=$((SECONDS + seconds_a_part))
    [ $deadline -gt "$limit" ] && deadline=$limit
    case $part in
        test) name=(all_tests) ;; # `test` is a shell builtin
        headline-kernels) name=(headline_kernels) ;;
        headline-*) name=(headline_e_step "${part#headline-}") ;;
        profile-*) name=(profile "${part#profile-}") ;;
        unet-*) name=(forward "${part#unet-}") ;;
        e_step-*) name=(e_step "${part#e_step-}") ;;
        *) name=("$part") ;;
    esac
    echo "=== $part ===" | tee -a "$log"
    if grep -q "^$part: " <<<"$lacking"; then
        grep "^$part: " <<<"$lacking" | tee -a "$log"
        result=MISSING
        failed=1
    else
        "${name[@]}" 2>&1 | tee -a "$log"
        if [ "${PIPESTATUS[0]}" -eq 0 ]; then
            result=ok
        else
            result=FAILED
            failed=1
        fi
    fi
    summary+=("$(printf '%-16s %-7s %4d s' "$part" "$result" $((SECONDS - began)))")
done

{
    echo
    echo "=== results ==="
    files=()
    for file in headline-group_norm headline-ops headline-adm headline-sd15 ops ops-warm group_norm group_norm-nchw \
        attention convolution residual_block unet-adm unet-sd15 e_step-adm e_step-sd15 train; do
        [ -e "$folder/$file.json" ] && files+=("$folder/$file.json")
    done
    printf '%s\n' "${summary[@]}"
    if [ ${#files[@]} -gt 0 ]; then
        "$python" -m benchmarks.harness.digest "${files[@]}"
    fi
} 2>&1 | tee -a "$log"
exit $failed
