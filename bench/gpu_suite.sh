#!/usr/bin/env bash
# The one command for a GPU machine: bash bench/gpu_suite.sh [--within SECONDS] [PART ...]
#
#   gpu-tests     timelines, decode steps, caps, models: all marked gpu      at most 250 s
#   stress        10,000 decode steps of random routing, poisoned slots      at most 150 s
#   kernel-tests  the kernels against their twins                            at most 220 s
#   tests         all three
#   copy          the link between host and GPU                              at most  90 s
#   kernels       the kernel bench                                           at most 275 s
#   serve         whole models on replayed routing, beside accelerate        at most 560 s
#   sanitize      decode steps under compute-sanitizer                       at most 150 s
#
# The parts run in the order in which they are named (`--part PART` does too); without any: tests copy kernels serve.
# Each file of tests has its own process, since after a fault of the device all else in that process fails; with
# pytest-xdist and eight cores or more, those that compile the most kernels have up to four.
# Where a command may take ten minutes, four calls do it: `gpu-tests stress sanitize`, `kernel-tests copy`, `kernels`,
# `serve`. With --within all parts together end by then: the limits of later ones shrink, the benches measure their first
# rows alone, and what has no time left is SKIPPED. Two calls give what matters most on a machine that one has for a
# quarter of an hour, two starts included; in the second, `serve` leaves to `kernel-tests` what its last cell does not take:
#
#   GPU_TESTS_SECONDS=130 STRESS_SECONDS=100 bash bench/gpu_suite.sh --within 320 gpu-tests stress sanitize
#   COPY_SECONDS=45 BENCH_SECONDS=45 SERVE_ARENA_GIB=8 SERVE_SECONDS=190 \
#       bash bench/gpu_suite.sh --within 320 copy kernels serve kernel-tests
#
# The benches' JSON and Markdown go to $OUT (bench/results without one), beside suite.log, with all that tests and benches
# print, and sanitizer.log: at most seven files a call. A bench takes the place of its results of the same day, unless
# RESULT_SUFFIX, which ends their names, differs. Short tables go to the terminal.
# duoserve need not be installed. Where the tree has no .git, DUOSERVE_COMMIT says which commit it is of.
# Exit status: 0 all passed; 1 a test or a part of a bench failed, could not run, was cut off or SKIPPED; 2 Python or torch is
# missing, or a PART is unknown; 3 there is no CUDA GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results}
tests_seconds=${TESTS_SECONDS:-220}
gpu_tests_seconds=${GPU_TESTS_SECONDS:-250}
copy_seconds=${COPY_SECONDS:-90}
bench_seconds=${BENCH_SECONDS:-225} # after which no part is begun; the last may take until the timeout
serve_seconds=${SERVE_SECONDS:-480}
serve_arena_gib=${SERVE_ARENA_GIB:-32} # of pinned memory, which takes its time to be pinned
sanitize_seconds=${SANITIZE_SECONDS:-150}
stress_seconds=${STRESS_SECONDS:-150}
grace=50
serve_grace=80 # the last cell may begin with a long prompt
steps=${STRESS_STEPS:-10000}
# Of the tests in tests/kernels those that run nothing on a GPU.
cpu_only='machine_code|in_flight|compiled_cache|compiled_loops|compiled_ops|decomposed|matmul|reference|streamed|tape|token_expert|unpacking|experts_together'
# Those that compile the most kernels.
compile_most='moe_gemm|moe_fill|bf12_product|decode_attention'
cores=${CORES:-$(nproc)}
unset TRITON_INTERPRET # which a shell may have left: it would put the kernels on the CPU

within=0 # no limit
least=30 # below which a part is not begun
least_of_kernels=45 # its worker takes a dozen to start, and then there is to be a row
parts=()
while (($#)); do
    case $1 in
        --within) within=${2:-} && shift ;;
        --part) parts+=("${2:-}") && shift ;;
        tests) parts+=(gpu-tests stress kernel-tests) ;;
        *) parts+=("$1") ;;
    esac
    shift
done
((${#parts[@]})) || parts=(gpu-tests stress kernel-tests copy kernels serve)
[[ $within =~ ^[0-9]+$ ]] || { echo "gpu_suite: --within takes whole seconds"; exit 2; }
for part in "${parts[@]}"; do
    [[ $part =~ ^(kernel-tests|gpu-tests|stress|copy|kernels|serve|sanitize)$ ]] || {
        echo "gpu_suite: no part is called $part"
        exit 2
    }
done

has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

missing() {
    local name
    for name in "$@"; do
        has "$name" || printf '%s ' "$name"
    done
}

export PYTHONPATH="$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
# One Python, for on a fresh machine each import of torch takes seconds.
gpu=$("$python" -c '
import re, sys
try:
    import torch
except Exception:
    sys.exit(2)
if not torch.cuda.is_available():
    sys.exit(3)
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))
')
case $? in
    0) ;;
    3)
        "$python" bench/bench_kernels.py
        echo "gpu_suite: no CUDA GPU: no test and no bench was run"
        exit 3
        ;;
    *)
        echo "gpu_suite: $python has no torch that works: nothing can run"
        exit 2
        ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

echo "== what is there"
[[ -z $(missing triton) ]] || echo "missing: triton: neither tests nor bench can run"
[[ -z $(missing transformers) ]] || echo "missing: transformers: its experts are not among the peers"
[[ -z $(missing accelerate) ]] || echo "missing: accelerate: its offloading is not measured"
untestable=$(missing pytest hypothesis)
[[ -z $untestable ]] || echo "missing: ${untestable}: the tests that need it cannot run, so the suite fails"
undressed=$(missing numpy safetensors tokenizers huggingface_hub jinja2 tqdm)
runner=("$python" -m pytest)
if [[ -n $undressed ]]; then
    # The package as a whole cannot be imported; its kernels need torch and triton alone. So a bare package of the same
    # name stands before it, whose modules are the real ones.
    echo "missing: ${undressed}: only duoserve.kernels can be imported, which is what is tested here"
    bare=$scratch/bare
    mkdir -p "$bare/duoserve"
    echo "__path__ = ['$PWD/duoserve']" >"$bare/duoserve/__init__.py"
    export PYTHONPATH="$bare:$PYTHONPATH"
    runner=("$python" -P -c 'import duoserve, pytest, sys; sys.exit(pytest.main(sys.argv[1:]))')
fi
# What spreads a file's tests over processes, each of which compiles what it needs. The bare package is the first one's.
each=$((cores / 4 < 4 ? cores / 4 : 4))
spread=""
if ((each > 1)) && [[ -z $undressed && -z $(missing xdist) ]]; then
    spread="-n $each"
fi
summary=()
status=0
mkdir -p "$out"

# limit SECONDS: these, or what is left of --within.
limit() {
    local left=$((within - SECONDS))
    echo $((within && left < $1 ? left : $1))
}

# beginning SECONDS GRACE: after how many of these a bench begins nothing more.
beginning() { echo $(($1 > $2 ? $1 - $2 : 1)); }

# kernels_begin SECONDS: the same for the kernel bench. Where its limit has shrunk, a third of that is grace.
kernels_begin() {
    local begun
    begun=$(beginning "$1" $((grace < $1 / 3 ? grace : $1 / 3)))
    echo $((begun < bench_seconds ? begun : bench_seconds))
}

# gpu_files WHERE ...: the files of tests that need a GPU and have no part or place of their own.
gpu_files() {
    grep -rlE 'mark\.gpu\b' "$@" --include='test_*.py' | grep -vE '^tests/(kernels/|test_\w*on_gpu)' | sort
}

CUT_OFF=124 # as timeout has it

# note WHAT STATUS: for the last line, and for the exit status.
note() {
    case $2 in
        0) summary+=("$1 passed") ;;
        "$CUT_OFF") summary+=("$1 cut off") ;;
        *) summary+=("$1 FAILED") ;;
    esac
    (($2 == 0)) || status=1
}

# interrupted SECONDS COMMAND ...: what pytest has found it says after SIGINT alone, which a job in the background ignores.
interrupted() { timeout -s INT -k 20 "$1" env --default-signal=INT "${@:2}"; }

# faults LOG: the tests that have failed by then, and the errors that compute-sanitizer has found, a line each.
faults() {
    grep -E '^={9} [^ ]' "$1" | grep -vE '^={9} (COMPUTE-SANITIZER|ERROR SUMMARY: 0|Error: |Warning: |Target app)|=$'
    grep -vE '^={9}( |$)' "$1" | grep -E '(^| )(FAILED|ERROR)( |$)'
}

# steps_of LOG: how many steps of stress were run in each mode, as the test says now and then.
steps_of() {
    local said
    said=$(grep -oE 'stress: [0-9]+ steps in [a-z]+ mode' "$1" | awk '
        !($5 in steps) { modes[++n] = $5 }
        { steps[$5] = $2 }
        END { for (i = 1; i <= n; i++) printf "%s%d %s steps", (i > 1 ? " and " : ""), steps[modes[i]], modes[i] }
    ')
    echo "${said:-no steps}"
}

# tested SECONDS FILE ARGUMENT ...: pytest with one file. CUT_OFF where that took longer and nothing had failed by then.
# What it printed is in the file $tested_log, and in suite.log.
tested() {
    local seconds=$1 log ended
    log=$(mktemp -p "$scratch")
    tested_log=$log
    interrupted "$seconds" "${runner[@]}" "${@:2}" -vv --durations=15 -o faulthandler_timeout=60 -p no:cacheprovider \
        >"$log" 2>&1
    ended=$?
    if ((ended == 124 || ended == 137)); then
        ended=$CUT_OFF
        [[ -z $(faults "$log") ]] || ended=1
        echo "gpu_suite: $2 did not finish in $seconds s" >>"$log"
    fi
    ((ended == 0)) || grep -E '^(FAILED|ERROR|E  ) ' "$log" | cut -c -200 | head -n 8
    echo "$2: $(tail -n 1 "$log")"
    { flock 9; echo "== $*"; cat "$log"; } 9>>"$out/suite.log" >&9
    return "$ended"
}

# tested_all SECONDS JOBS ARGUMENTS FILE ...: each file with these arguments, so many at a time; of "FILE|WHICH" the tests
# that `-k WHICH` chooses, of "FILE|WHICH|MORE" with more arguments. One that is alone leaves a third of the time to those
# behind it. Its status is that of the worst: a failure, then CUT_OFF.
tested_all() {
    local end=$((SECONDS + $1)) jobs=$2 arguments=$3 entry file which more job left worst=0 started=()
    for entry in "${@:4}"; do
        IFS="|" read -r file which more <<<"$entry"
        while (($(jobs -rp | wc -l) >= jobs)); do sleep 0.1; done
        left=$(((end - SECONDS) * (jobs > 1 ? 3 : 2) / 3))
        if ((left < 1)); then
            echo "$file: no time is left"
            worst=$CUT_OFF
            continue
        fi
        # shellcheck disable=SC2086 # several words
        tested "$left" "$file" $arguments $more ${which:+-k "$which"} &
        started+=($!)
    done
    for job in "${started[@]}"; do
        wait "$job"
        case $? in
            0) ;;
            "$CUT_OFF") ((worst)) || worst=$CUT_OFF ;;
            *) worst=1 ;;
        esac
    done
    return $worst
}

# worse STATUS STATUS: a failure before CUT_OFF before 0.
worse() { echo $(($1 == 0 || ($1 == CUT_OFF && $2 != 0) ? $2 : $1)); }

# Decode steps under compute-sanitizer. CUT_OFF where that took longer and nothing had been found by then.
sanitized() {
    local log="$out/sanitizer.log" ended
    STRESS_STEPS=60 interrupted "$(limit "$sanitize_seconds")" compute-sanitizer \
        --error-exitcode 9 --report-api-errors no \
        "${runner[@]}" tests/test_decode_on_gpu.py -k stress -vv -s -p no:cacheprovider >"$log" 2>&1
    ended=$?
    tail -n 4 "$log"
    if ((ended != 0)); then
        echo "gpu_suite: compute-sanitizer ended with status $ended (9: it found errors; 124: its time was up; 127: not there)"
        faults "$log" | cut -c -200 | head -n 8
    fi
    ((ended != 137)) || ended=$CUT_OFF
    [[ $ended != "$CUT_OFF" || -z $(faults "$log") ]] || ended=1
    return "$ended"
}

# measured NAME SECONDS REPORT COMMAND ...: a bench; REPORT, a module, makes Markdown of its JSON where it was cut off or
# printed none.
measured() {
    local result="$out/$1-$gpu-$(date -u +%Y-%m-%d)${RESULT_SUFFIX:-}" log="$out/suite.log" seconds=$2 report=$3 ended
    echo "== the $1 bench" >>"$log"
    rm -f "$result.json" "$result.md" # of an earlier run: what this one does not measure has no figures
    timeout -k 10 "$seconds" "$python" "${@:4}" --json "$result.json" >"$result.md" 2>>"$log"
    ended=$?
    if ((ended != 0)); then
        tail -n 20 "$log"
        echo "gpu_suite: the $1 bench ended with status $ended"
    fi
    if [[ -f $result.json ]]; then
        if ((ended >= 124)) || [[ ! -s $result.md ]]; then
            "$python" -P -m "$report" "$result.json" >"$result.md"
        fi
        "$python" -P -m "$report" "$result.json" --short
    else
        cat "$result.md"
    fi
    return "$ended"
}

for part in "${parts[@]}"; do
    needed=$least
    [[ $part != kernels ]] || needed=$least_of_kernels
    if ((within && within - SECONDS < needed)); then
        echo "== $part: no time is left"
        summary+=("$part SKIPPED")
        status=1
        continue
    fi
    case $part in
        kernel-tests)
            seconds=$(limit "$tests_seconds")
            echo "== the kernel tests, at most $seconds s"
            # Compiling is most of the time, and the GPU takes them all; what is long comes first.
            mapfile -t files < <(
                ls -S tests/kernels/test_*.py | grep -E "/test_($compile_most)\.py" | sed "s/\$/||$spread/"
                ls -S tests/kernels/test_*.py | grep -vE "/test_($compile_most|$cpu_only)\.py"
            )
            OMP_NUM_THREADS=2 tested_all "$seconds" 8 "" "${files[@]}"
            note "kernel tests" $?
            ;;
        gpu-tests)
            seconds=$(limit "$gpu_tests_seconds")
            echo "== the other tests of a GPU, at most $seconds s"
            caps="cap or plan"
            files=( # what matters most
                "tests/test_on_gpu.py|$caps"
                "tests/test_on_gpu.py|not ($caps)"
            )
            # The library's before those of the benches.
            mapfile -t -O ${#files[@]} files < <(gpu_files tests --exclude-dir=bench; gpu_files tests/bench)
            # One after another: they measure memory, and count what the whole device holds, but for decode steps, which
            # look at their own process. A quarter of the time is kept from the first two, which may hang.
            end=$((SECONDS + seconds))
            tested_all $((seconds * 3 / 4)) 1 "-m gpu" \
                tests/test_timeline_on_gpu.py "tests/test_decode_on_gpu.py|not stress|$spread"
            ended=$?
            tested_all $((end - SECONDS)) 1 "-m gpu" "${files[@]}"
            note "GPU tests" "$(worse $ended $?)"
            ;;
        stress)
            seconds=$(limit "$stress_seconds")
            echo "== $steps decode steps of random routing, at most $seconds s"
            # One process: it has all of the time.
            STRESS_STEPS=$steps tested "$seconds" tests/test_decode_on_gpu.py -m gpu -k stress -s
            ended=$?
            note "stress of $(steps_of "$tested_log")" "$ended"
            ;;
        copy)
            seconds=$(limit "$copy_seconds")
            echo "== the link, at most $seconds s"
            measured copy "$seconds" gpu.copy_report bench/bench_copy.py
            note "copy bench" $?
            ;;
        kernels)
            seconds=$(limit $((bench_seconds + grace)))
            echo "== the kernel bench, at most $seconds s"
            measured kernels "$seconds" gpu.kernel_report \
                bench/bench_kernels.py --seconds "$(kernels_begin "$seconds")"
            note "kernel bench" $?
            ;;
        serve)
            seconds=$(limit $((serve_seconds + serve_grace)))
            echo "== whole models, at most $seconds s"
            measured serve "$seconds" serve.report \
                bench/bench_serve.py --arena-gib "$serve_arena_gib" --seconds "$(beginning "$seconds" "$serve_grace")"
            note "serving bench" $?
            ;;
        sanitize)
            echo "== decode steps under compute-sanitizer, at most $(limit "$sanitize_seconds") s"
            sanitized
            ended=$?
            note "sanitizer over $(steps_of "$out/sanitizer.log")" "$ended"
            ;;
    esac
done

printf 'gpu_suite: %s; see %s\n' "$(IFS=,; echo "${summary[*]}" | sed 's/,/, /g')" "$out"
exit $status
