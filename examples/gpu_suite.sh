#!/usr/bin/env bash
# Everything that only a GPU can show, in one call on a machine with one GPU and no network: the `gpu` tests (each of our
# kernels, forward and backward, against its twin), every operation's backends side by side and against the targets, the
# whole step in bf16 and in FP8, attention over ranks that share a sequence in turn, throughput, a bf16 quickstart.
#
#   examples/gpu_suite.sh --collect DIR     on a machine with a network: wheels of what a bare GPU image lacks
#   examples/gpu_suite.sh [--wheels DIR]    on the GPU machine: installs them beside the image's packages, runs all
#   examples/gpu_suite.sh --only "A B"      the stages named alone
#   examples/gpu_suite.sh --rehearse        every stage at tiny size on the CPU, our kernels in Triton's interpreter: shows
#                                           that the suite runs; each file says that its numbers mean nothing
#   examples/gpu_suite.sh --dry-run         prints what would run
#
# The image brings torch with CUDA, triton and the usual libraries; `python3` there is the one with torch (PYTHON names
# another). Results go to OUT, else to docs/benchmarks/ (a rehearsal's to runs/gpu_suite_rehearsal/): gpu_suite.md
# (machine, versions, each stage's outcome, the whole step's targets), gpu_suite.log, {kernels,attention,throughput}_gpu.
# {md,json,png}, {step,step_fp8}_gpu.{json,md}, quickstart_gpu.{json,png}. The stages of most use come first. A stage that
# fails or outruns its time is recorded and the next one runs; the exit code is the number of stages that failed. What a
# stage had said until then is in the log; the tests tell each failure at once.
#
#   PYTHON_VERSION   of the GPU machine, for --collect (default 3.12)
#   BENCH_RECIPE     of the stage throughput, default tools/benchmarks/recipes/bench_cpu_large.yaml
#   STAGE_SECONDS    longest time of every stage (default: each its own)
#   SUITE_SECONDS    of the whole suite (default 590, within ten minutes)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# At the versions of constraints-cpu.txt, without their requirements: the image has those.
needed="megatron-core omegaconf pydantic pydantic-core annotated-types typing-inspection typing-extensions transformers
  hypothesis pytest-timeout"
python="${PYTHON:-python3}"
suite_seconds="${SUITE_SECONDS:-590}"
least_seconds=10 # a stage that has less is not begun
wheels="" dry_run="" rehearsal="" only="" failed=0 count=0

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

# The seconds that a stage of at most $1 has now.
seconds_of() {
  local own="${STAGE_SECONDS:-$1}" left=$((suite_seconds - SECONDS))
  echo $((own < left ? own : left))
}

# Runs one stage: its title, its longest time in seconds, its command, in which @SECONDS@ becomes the time it has, less
# what it takes to begin and to write its files. Everything it prints goes to the log, its outcome to the summary;
# returns whether it has run well.
stage() {
  local title="$1" limit started=$SECONDS code
  limit="$(seconds_of "$2")"
  shift 2
  [ -z "$only" ] || [[ " $only " == *" $title "* ]] || return 1
  if [ -n "$dry_run" ]; then
    echo "$title: $*"
    return 1
  fi
  count=$((count + 1))
  if [ "$limit" -lt "$least_seconds" ] && [ -z "${STAGE_SECONDS:-}" ]; then
    echo "| $title | not run | 0 | the suite's ${suite_seconds} s were over |" >>"$out/gpu_suite.md"
    failed=$((failed + 1))
    return 1
  fi
  rm -f "$out/$title"_gpu.{md,json,png} # no older run is passed off
  set -- "${@//@SECONDS@/$((limit > 30 ? limit - 20 : limit))}"
  printf '\n== %s\n   %s\n' "$title" "$*" | tee -a "$out/gpu_suite.log"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/gpu_suite.log"
  code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || failed=$((failed + 1))
  echo "| $title | $code | $((SECONDS - started)) | \`$(echo "$*" | tr '\n' ' ')\` |" >>"$out/gpu_suite.md"
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

# Says in every file of a rehearsal that it is one.
mark() {
  "$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

from PIL import Image, ImageDraw

SAYS = "REHEARSAL on the CPU at tiny sizes: no number here means anything"
for path in Path(sys.argv[1]).glob("*_gpu.*"):
    if path.suffix == ".json":
        path.write_text(json.dumps({"rehearsal": SAYS, **json.loads(path.read_text())}, indent=1) + "\n")
    elif path.suffix == ".md":
        path.write_text(f"**{SAYS}**\n{path.read_text()}")
    elif path.suffix == ".png":
        image = Image.open(path).convert("RGB")
        ImageDraw.Draw(image).text((8, 8), SAYS, fill="red")
        image.save(path)
for name in ("gpu_suite.md", "gpu_suite.log"):
    path = Path(sys.argv[1]) / name
    path.write_text(f"**{SAYS}**\n\n{path.read_text()}")
PYTHON
}

while [ $# -gt 0 ]; do
  case "$1" in
    --collect) [ $# -eq 2 ] || fail "--collect needs a directory, and nothing else"; collect "$2"; exit ;;
    --wheels) [ $# -ge 2 ] || fail "--wheels needs a directory"; wheels="$2"; shift 2 ;;
    --only) [ $# -ge 2 ] || fail "--only needs the names of stages"; only="$2"; shift 2 ;;
    --rehearse) rehearsal=yes; shift ;;
    --dry-run) dry_run=yes; shift ;;
    *) fail "found $1; options are --collect DIR, --wheels DIR, --only STAGES, --rehearse, --dry-run" ;;
  esac
done

step_recipe=tools/benchmarks/recipes/bench_gpu_step.yaml
if [ -z "$rehearsal" ]; then
  out="${OUT:-docs/benchmarks}"
  recipe="${BENCH_RECIPE:-tools/benchmarks/recipes/bench_cpu_large.yaml}"
  tests=() device=cuda
  kernels=(--device cuda)
  attention=(--lengths 131072 --ranks 2 4 8 --heads 32 --kv-heads 8 --width 128)
  step=(runtime.device=cuda) step_options=(--images 8 --rounds 3 --steps 2)
  throughput=(precision.params=bf16) throughput_options=()
  quickstart=("$python" examples/quickstart/run.py --ranks 1 runtime.device=cuda precision.params=bf16
    parallel.tensor=1 parallel.pipeline=1 parallel.sequence=false)
  quickstart_files=runs/quickstart
else
  out="${OUT:-runs/gpu_suite_rehearsal}"
  recipe="${BENCH_RECIPE:-tools/benchmarks/recipes/bench_cpu.yaml}"
  suite_seconds="${SUITE_SECONDS:-3600}" STAGE_SECONDS="${STAGE_SECONDS:-900}"
  tests=(--collect-only -q) device=cpu # without a GPU they are collected, and none is run
  kernels=(--device cpu --tiny --rounds 1 --compile none)
  attention=(--lengths 256 --ranks 2 --rounds 1 --heads 2 --kv-heads 1 --width 16)
  tiny=model.language.config
  step=(runtime.device=cpu precision.params=fp32 training.sequence_length=128
    "$tiny.vocab_size=320" "$tiny.hidden_size=64" "$tiny.intermediate_size=96" "$tiny.num_hidden_layers=2"
    "$tiny.num_attention_heads=4" "$tiny.num_key_value_heads=2" "$tiny.max_position_embeddings=128"
    model.vision.config.hidden_size=32 model.vision.config.intermediate_size=64 model.vision.config.num_hidden_layers=2
    model.vision.config.num_attention_heads=2 model.vision.config.image_size=70)
  step_options=(--images 2 --rounds 1 --steps 1)
  throughput=() throughput_options=(--rounds 1 --steps 1)
  quickstart_files="$out/quickstart"
  # Three steps of the first phase, and the questions about single digits, which they do not teach.
  quickstart=(bash -ec '
    "$0" examples/quickstart/make_data.py "$1/data"
    rm -rf "$1/phase1"
    "$0" tools/train.py examples/recipes/quickstart_phase1.yaml runtime.device=cpu parallel.tensor=1 parallel.pipeline=1 \
      parallel.sequence=false "data.path=$1/data/train.json" "model.language.tokenizer=$1/data/tokenizer" \
      training.steps=3 "checkpoint.directory=$1/phase1"
    "$0" tools/evaluate.py "$1/phase1" --task exact_match --data "$1/data/eval_digit.json" --max-new-tokens 2 \
      --output "$1/evaluation"
    "$0" -c "
import json, pathlib, sys
from examples.quickstart.drawings import draw_loss
root = pathlib.Path(sys.argv[1])
lines = (root / \"phase1\" / \"metrics.jsonl\").read_text().splitlines()
draw_loss({\"phase1\": [json.loads(line) for line in lines]}, root / \"loss.png\")" "$1"' "$python" "$quickstart_files")
fi

if [ -z "$dry_run" ]; then
  [ -z "$wheels" ] || install_wheels "$wheels"
  export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
  if [ -n "$rehearsal" ]; then
    export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
  else
    unset TRITON_INTERPRET # kernels are compiled
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "no CUDA device that torch can use"
  fi
  mkdir -p "$out"
  : >"$out/gpu_suite.log"
  describe >"$out/gpu_suite.md"
fi

stage tests 180 "$python" -m tests.helpers.file_by_file --at-once 6 --seconds @SECONDS@ tests/kernels tests/gpu -- -m gpu \
  "${tests[@]}"

stage kernels 200 "$python" tools/bench.py kernels "${kernels[@]}" --seconds @SECONDS@ \
  --json "$out/kernels_gpu.json" --png "$out/kernels_gpu.png" --markdown "$out/kernels_gpu.md"

stage step 100 "$python" tools/bench.py throughput "$step_recipe" "${step[@]}" "${step_options[@]}" \
  --json "$out/step_gpu.json" --markdown "$out/step_gpu.md"
stage step_fp8 100 "$python" tools/bench.py throughput "$step_recipe" "${step[@]}" precision.fp8=tensorwise \
  "${step_options[@]}" \
  --json "$out/step_fp8_gpu.json" --markdown "$out/step_fp8_gpu.md"

stage attention 60 "$python" tools/bench.py attention "${attention[@]}" --device "$device" \
  --json "$out/attention_gpu.json" --png "$out/attention_gpu.png" --markdown "$out/attention_gpu.md"

stage throughput 90 "$python" tools/bench.py throughput "$recipe" "runtime.device=$device" "${throughput[@]}" "${throughput_options[@]}" \
  --against transformers --json "$out/throughput_gpu.json" --png "$out/throughput_gpu.png" \
  --markdown "$out/throughput_gpu.md"

if stage quickstart 120 "${quickstart[@]}"; then
  cp "$quickstart_files/evaluation/exact_match.json" "$out/quickstart_gpu.json"
  cp "$quickstart_files/loss.png" "$out/quickstart_gpu.png"
fi

if [ -z "$dry_run" ]; then
  { echo; "$python" -m tools.benchmarks.kernels.targets "$out"; } >>"$out/gpu_suite.md" 2>>"$out/gpu_suite.log"
  [ -z "$rehearsal" ] || mark
  printf '\n%s of %s stages failed; results are in %s\n' "$failed" "$count" "$out"
fi
exit "$failed"
