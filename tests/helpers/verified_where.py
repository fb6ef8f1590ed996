"""README's table of what has run where, made from the results under docs/benchmarks.

`python -m tests.helpers.verified_where` writes it into README.md. A feature has run on the CPU where the tests' record
(`pytest --record`) has all its test files as passed, or a benchmark's JSON is of a CPU; on one GPU where
examples/gpu_suite.sh recorded a stage that covers it with exit code 0; on several where a benchmark's JSON is of more
than one rank on a CUDA device.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.results import RECORD, Results, outcome

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- verified where: made by python -m tests.helpers.verified_where -->", "<!-- end -->"
YES, NEVER, UNRECORDED = "yes", "never run", "no record"


@dataclass(frozen=True)
class Feature:
    """A claim of the README.

    Args:
        tests: files or folders under tests/.
        stage: of gpu_suite.md, that runs it on a GPU; None where none does.
        benchmark: `benchmark` of the JSON that measures it.
    """

    name: str
    tests: tuple[str, ...]
    stage: str | None = None
    benchmark: str | None = None


FEATURES = (
    Feature("the three-phase step in every layout", ("distributed/test_master.py",), "tests"),
    Feature("quickstart: two phases, evaluation", ("system/test_quickstart.py",), "quickstart"),
    Feature("throughput against transformers", ("system/test_bench.py",), "throughput", "throughput"),
    Feature(
        "attention over ranks that share a sequence",
        ("distributed/test_context_attention.py",),
        "attention",
        "attention",
    ),  # fmt: skip
    Feature("fused kernels; on the CPU by Triton's interpreter", ("kernels",), "tests", "kernels"),
    Feature("FP8, native", ("distributed/test_fp8.py", "distributed/test_fp8_training.py")),
    Feature("checkpoints between layouts, exact resume", ("distributed/test_checkpoint.py", "system/test_kills.py")),
    Feature("two nodes: one lost, one joining", ("system/test_two_nodes.py",)),
    Feature("weights in and out", ("conversion",)),
    Feature("answers, evaluation, in any layout", ("distributed/test_generation.py", "distributed/test_evaluation.py")),
    Feature("`--check-layout`", ("distributed/test_check_layout.py",)),
    Feature("extensions of your own", ("system/test_extensions.py",)),
)


def table(root: Path = ROOT) -> str:
    """The table in Markdown."""
    benchmarks = root / "docs" / "benchmarks"
    stages, several, alone = stages_passed(benchmarks), benchmarks_on_gpus(benchmarks), benchmarks_on_cpus(benchmarks)
    results = tests_recorded(root)
    rows = [
        (
            feature.name,
            on_a_cpu(results, feature, alone),
            stages.get(feature.stage or "", NEVER),
            YES if feature.benchmark in several else NEVER,
        )
        for feature in FEATURES
    ]
    head = (("", "CPU, gloo", "one GPU", "several GPUs, NCCL"), ("---",) * 4)
    return "\n".join(f"| {' | '.join(row)} |" for row in (*head, *rows))


def tests_recorded(root: Path) -> Results:
    """The tests' record; empty where there is none."""
    path = root / RECORD
    found: Results = json.loads(path.read_text()) if path.exists() else {}
    return found


def on_a_cpu(results: Results, feature: Feature, benchmarks: set[str]) -> str:
    """The worst outcome of its tests: a failure, then no record, for which a benchmark's stands, then a pass."""
    found = [outcome(results, f"tests/{path}") for path in feature.tests]
    if "fails" in found:
        return "fails"
    return UNRECORDED if None in found and feature.benchmark not in benchmarks else YES


def stages_passed(benchmarks: Path) -> dict[str, str]:
    """Stage of the GPU suite that ended with 0 -> the GPU it ran on."""
    report = benchmarks / "gpu_suite.md"
    if not report.exists():
        return {}
    text = report.read_text()
    gpu = re.search(r"\d+ x (?:NVIDIA )?(.+?) \(", text)
    where = f"yes, {gpu[1]}" if gpu else YES
    return {stage: where for stage in re.findall(r"^\| (\w+) \| 0 \|", text, re.MULTILINE)}


def benchmarks_on_gpus(benchmarks: Path) -> set[str]:
    """Names of the benchmarks that a JSON records on several ranks with GPUs."""
    return {name for name, device, ranks in _benchmarks(benchmarks) if ranks > 1 and not device.startswith("CPU")}


def benchmarks_on_cpus(benchmarks: Path) -> set[str]:
    """Names of the benchmarks that a JSON records on CPUs."""
    return {name for name, device, _ in _benchmarks(benchmarks) if device.startswith("CPU")}


def _benchmarks(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Name, device and number of ranks of each benchmark that told its machine."""
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        if "benchmark" in result and "device" in result.get("machine", {}):
            yield str(result["benchmark"]), str(result["machine"]["device"]).upper(), result.get("world_size", 1)


def rewritten(readme: str, root: Path = ROOT) -> str:
    """The README with its table made anew."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"README.md needs the lines {BEGIN} and {END}"
    return f"{before}{BEGIN}\n\n{table(root)}\n\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text()))
