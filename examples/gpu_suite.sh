#!/usr/bin/env bash
# Everything that only a GPU can show, in one call on a machine with one GPU and no network: the `gpu` tests (our kernels'
# among them), a bf16 quickstart, the benchmarks of throughput, of attention over ranks that share a sequence, in turn,
# and of every operation's backends side by side.
#
#   examples/gpu_suite.sh --collect DIR     on a machine with a network: wheels of what a bare GPU image lacks
#   examples/gpu_suite.sh [--wheels DIR]    on the GPU machine: installs them beside the image's packages, runs all
#   examples/gpu_suite.sh --dry-run         prints what would run
#
# The image brings torch with CUDA, triton and the usual libraries; `python3` there is the one with torch (PYTHON names
# another). Results go to OUT, else to docs/benchmarks/: gpu_suite.md (machine, versions, each stage's outcome),
# gpu_suite.log, {throughput,attention,kernels}_gpu.{md,json,png}, quickstart_gpu.{json,png}. A stage that fails or outruns
# its time is recorded and the next one runs; the exit code is the number of stages that failed.
#
#   PYTHON_VERSION   of the GPU machine, for --collect (default 3.12)
#   BENCH_RECIPE     default examples/recipes/bench_cpu_large.yaml
#   STAGE_SECONDS    longest time of a stage (default 115: five stages within ten minutes)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# At the versions of constraints-cpu.txt, without their requirements: the image has those.
needed="megatron-core omegaconf pydantic pydantic-core annotated-types typing-inspection typing-extensions transformers
  hypothesis pytest-timeout"
python="${PYTHON:-python3}"
out="${OUT:-docs/benchmarks}"
recipe="${BENCH_RECIPE:-examples/recipes/bench_cpu_large.yaml}"
limit="${STAGE_SECONDS:-115}"
wheels="" dry_run="" failed=0

fail() { echo "error: $1" >&2; exit 1; }

collect() {
  local version="${PYTHON_VERSION:-3.12}" pins=() name platforms=()
  for name in $needed; do
    pins+=("$(grep -E "^$name==" constraints-cpu.txt)") || fail "constraints-cpu.txt: found no $name"
  done
  for name in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${name}_x86_64")
  done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --dest "$1" "${pins[@]}" || fail "pip download failed"
  du -sh "$1"
}

# Runs one stage: its title, then its command. Everything it prints goes to the log, its outcome to the summary; returns
# whether it has run well.
stage() {
  local title="$1" started=$SECONDS code
  shift
  if [ -n "$dry_run" ]; then
    echo "$title: $*"
    return 1
  fi
  printf '\n== %s\n   %s\n' "$title" "$*" | tee -a "$out/gpu_suite.log"
  timeout --kill-after=20 "$limit" "$@" 2>&1 | tee -a "$out/gpu_suite.log"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || failed=$((failed + 1))
  echo "| $title | $code | $((SECONDS - started)) | \`$*\` |" >>"$out/gpu_suite.md"
  return "$code"
}

describe() {
  echo "# GPU suite"
  echo
  "$python" - <<'PYTHON'
import datetime, importlib.metadata as metadata, platform, torch

print(f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, Python {platform.python_version()},", end=" ")
if torch.cuda.is_available():
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    print(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} ({memory:.0f} GiB), CUDA {torch.version.cuda}")
print()
for name in ("torch", "triton", "megatron-core", "transformers", "numpy", "transformer-engine", "flash-attn"):
    try:
        print(f"- {name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        print(f"- {name}: none")
PYTHON
  echo "- driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | sed -n 1p)"
  echo "- commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  echo
  echo "| stage | exit code | seconds | command |"
  echo "|---|---|---|---|"
}

install_wheels() {
  local site
  site="$(mktemp -d)"
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$1"/*.whl ||
    fail "the wheels in $1 cannot be installed"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
}

while [ $# -gt 0 ]; do
  case "$1" in
    --collect) [ $# -eq 2 ] || fail "--collect needs a directory, and nothing else"; collect "$2"; exit ;;
    --wheels) [ $# -ge 2 ] || fail "--wheels needs a directory"; wheels="$2"; shift 2 ;;
    --dry-run) dry_run=yes; shift ;;
    *) fail "found $1; options are --collect DIR, --wheels DIR, --dry-run" ;;
  esac
done

if [ -z "$dry_run" ]; then
  [ -z "$wheels" ] || install_wheels "$wheels"
  export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "no CUDA device that torch can use"
  mkdir -p "$out"
  : >"$out/gpu_suite.log"
  rm -f "$out/throughput_gpu.md" "$out/attention_gpu.md" "$out/kernels_gpu.md" # the benchmarks append
  describe >"$out/gpu_suite.md"
fi

stage "tests" "$python" -m pytest -q -m gpu --continue-on-collection-errors -p no:cacheprovider tests
if stage "quickstart" \
  "$python" examples/quickstart/run.py --ranks 1 runtime.device=cuda precision.params=bf16 parallel.tensor=1 parallel.pipeline=1 parallel.sequence=false
then
  cp runs/quickstart/evaluation/exact_match.json "$out/quickstart_gpu.json"
  cp runs/quickstart/loss.png "$out/quickstart_gpu.png"
fi
stage "throughput" "$python" tools/bench.py throughput "$recipe" runtime.device=cuda precision.params=bf16 \
  --against transformers --json "$out/throughput_gpu.json" --png "$out/throughput_gpu.png" \
  --markdown "$out/throughput_gpu.md"

stage "attention" "$python" tools/bench.py attention --lengths 131072 --ranks 2 4 8 --heads 32 --kv-heads 8 --width 128 \
  --device cuda --json "$out/attention_gpu.json" --png "$out/attention_gpu.png" --markdown "$out/attention_gpu.md"

stage "kernels" "$python" tools/bench.py kernels --device cuda \
  --json "$out/kernels_gpu.json" --png "$out/kernels_gpu.png" --markdown "$out/kernels_gpu.md"

[ -n "$dry_run" ] || printf '\n%s of 5 stages failed; results are in %s\n' "$failed" "$out"
exit "$failed"
