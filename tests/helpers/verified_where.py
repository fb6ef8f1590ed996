"""README's table of what has run where, made from the tests that are there and the results under docs/benchmarks.

`python -m tests.helpers.verified_where` writes it into README.md. A feature has run on the CPU where its test files
hold tests without the gpu marker (the lanes run them all); on one GPU where examples/gpu_suite.sh recorded a stage that
covers it with exit code 0; on several where a benchmark's JSON is of more than one rank on a CUDA device.
"""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- verified where: made by python -m tests.helpers.verified_where -->", "<!-- end -->"
YES, NEVER = "yes", "never run"


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
    stages, several = stages_passed(root / "docs" / "benchmarks"), benchmarks_on_gpus(root / "docs" / "benchmarks")
    rows = [
        (
            feature.name,
            YES if all(has_cpu_tests(root / "tests" / path) for path in feature.tests) else NEVER,
            stages.get(feature.stage or "", NEVER),
            YES if feature.benchmark in several else NEVER,
        )
        for feature in FEATURES
    ]
    head = (("", "CPU, gloo", "one GPU", "several GPUs, NCCL"), ("---",) * 4)
    return "\n".join(f"| {' | '.join(row)} |" for row in (*head, *rows))


def has_cpu_tests(path: Path) -> bool:
    """Whether the file, or any in the folder, holds a test without the gpu marker."""
    files = sorted(path.rglob("test_*.py")) if path.is_dir() else [path] if path.exists() else []
    functions = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    return any(
        isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not any("gpu" in ast.unparse(decorator) for decorator in node.decorator_list)
        for node in functions
    )


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
    found = set()
    for path in benchmarks.glob("*.json"):
        result = json.loads(path.read_text())
        device = str(result.get("machine", {}).get("device", "CPU"))
        if result.get("world_size", 1) > 1 and device.upper() != "CPU":
            found.add(str(result.get("benchmark")))
    return found


def rewritten(readme: str, root: Path = ROOT) -> str:
    """The README with its table made anew."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"README.md needs the lines {BEGIN} and {END}"
    return f"{before}{BEGIN}\n\n{table(root)}\n\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text()))
