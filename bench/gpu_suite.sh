#!/usr/bin/env bash
# The one command for a GPU machine: bash bench/gpu_suite.sh
#
# The kernel tests on the GPU first, then the kernel bench, within nine minutes. The bench's JSON and Markdown and the
# tests' log go to $OUT (bench/results without one), a short table to the terminal. duoserve need not be installed.
# Where the tree has no .git, DUOSERVE_COMMIT says which commit it is of. With SANITIZE=1, decode steps run under
# compute-sanitizer too, which takes up to three minutes more.
# Exit status: 0 all passed; 1 a test or a part of the bench failed, or the tests could not run; 2 Python or torch is
# missing; 3 there is no CUDA GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results}
tests_seconds=${TESTS_SECONDS:-220}
bench_seconds=${BENCH_SECONDS:-225} # after which no part is begun; the last may take until the timeout
bench_timeout=$((bench_seconds + 50))
unset TRITON_INTERPRET # which a shell may have left: it would put the kernels on the CPU

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

missing() {
    local name
    for name in "$@"; do
        has "$name" || printf '%s ' "$name"
    done
}

"$python" -c 'import torch' 2>/dev/null || { echo "gpu_suite: $python has no torch: nothing can run"; exit 2; }
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$python" bench/bench_kernels.py
    echo "gpu_suite: no CUDA GPU: no test and no bench was run"
    exit 3
fi

echo "== what is there"
[[ -z $(missing triton) ]] || echo "missing: triton: neither tests nor bench can run"
[[ -z $(missing transformers) ]] || echo "missing: transformers: its experts are not among the peers"
untestable=$(missing pytest hypothesis)
[[ -z $untestable ]] || echo "missing: ${untestable}: the tests that need it cannot run, so the suite fails"
undressed=$(missing numpy einops safetensors tokenizers huggingface_hub tqdm)
workers=()
runner=("$python" -m pytest)
if [[ -n $undressed ]]; then
    # The package as a whole cannot be imported; its kernels need torch and triton alone. So a bare package of the same
    # name stands before it, whose modules are the real ones.
    echo "missing: ${undressed}: only duoserve.kernels can be imported, which is what is tested here"
    bare=$(mktemp -d)
    trap 'rm -rf "$bare"' EXIT
    mkdir "$bare/duoserve"
    echo "__path__ = ['$PWD/duoserve']" >"$bare/duoserve/__init__.py"
    export PYTHONPATH="$bare:$PYTHONPATH"
    runner=("$python" -P -c 'import duoserve, pytest, sys; sys.exit(pytest.main(sys.argv[1:]))')
elif has xdist; then
    workers=(-n 8) # compiling is most of the time; the GPU takes them all
fi
status=0
mkdir -p "$out"

echo "== the kernel tests, at most $tests_seconds s"
mapfile -t marked < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py' | grep -v '^tests/kernels/')
timeout -k 10 "$tests_seconds" "${runner[@]}" tests/kernels "${marked[@]}" "${workers[@]}" \
    --ignore=tests/kernels/test_machine_code.py --continue-on-collection-errors -p no:cacheprovider \
    >"$out/gpu-tests.log" 2>&1
tests=$?
tail -n 12 "$out/gpu-tests.log"
if ((tests == 124 || tests == 137)); then
    echo "gpu_suite: the tests did not finish in $tests_seconds s"
fi
((tests == 0)) || status=1

if [[ ${SANITIZE:-0} == 1 ]]; then
    echo "== decode steps under compute-sanitizer, at most 180 s"
    STRESS_STEPS=60 timeout -k 10 180 compute-sanitizer --error-exitcode 9 "$python" -m pytest \
        tests/test_decode_on_gpu.py -k stress -p no:cacheprovider >"$out/sanitizer.log" 2>&1
    sanitized=$?
    tail -n 4 "$out/sanitizer.log"
    if ((sanitized != 0)); then
        status=1
        echo "gpu_suite: compute-sanitizer ended with status $sanitized (9: it found errors; 127: it is not there)"
    fi
fi

echo "== the kernel bench, at most $bench_timeout s"
gpu=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))')
result="$out/kernels-$gpu-$(date -u +%Y-%m-%d)"
timeout -k 10 "$bench_timeout" "$python" bench/bench_kernels.py --seconds "$bench_seconds" --json "$result.json" \
    >"$result.md" 2>"$out/bench.log"
bench=$?
if ((bench != 0)); then
    status=1
    tail -n 20 "$out/bench.log"
    echo "gpu_suite: the bench ended with status $bench"
fi
if [[ -f $result.json ]]; then
    ((bench < 124)) || "$python" bench/kernel_report.py "$result.json" >"$result.md" # it was cut off: what there is
    "$python" bench/kernel_report.py "$result.json" --short
fi

echo "gpu_suite: tests $( ((tests == 0)) && echo passed || echo FAILED), bench $( ((bench == 0)) && echo passed || echo FAILED); see $out"
exit $status
