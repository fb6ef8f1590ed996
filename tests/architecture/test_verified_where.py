"""README's table of what has run where is what tests and benchmark files say now (DESIGN D15)."""

import json
from pathlib import Path

from tests.helpers import verified_where
from tests.helpers.verified_where import FEATURES, ROOT, rewritten, table


def test_the_readme_is_current() -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme == rewritten(readme), "run: python -m tests.helpers.verified_where"


def test_never_run_is_said_plainly_until_it_has() -> None:
    never = not verified_where.benchmarks_on_gpus(ROOT / "docs" / "benchmarks")
    assert never == ("**NCCL on several GPUs: never run.**" in (ROOT / "README.md").read_text())


def test_limitations_say_that_nothing_ran_on_a_gpu_until_something_has() -> None:
    text, results = (ROOT / "docs" / "limitations.md").read_text(), ROOT / "docs" / "benchmarks"
    assert ("- **GPU**: nothing." in text) == (not verified_where.stages_passed(results))
    assert ("- **NCCL on several GPUs**: nothing." in text) == (not verified_where.benchmarks_on_gpus(results))


def test_the_table_follows_tests_and_results(tmp_path: Path) -> None:
    (tmp_path / "tests" / "distributed").mkdir(parents=True)
    results = tmp_path / "docs" / "benchmarks"
    results.mkdir(parents=True)
    assert set(table(tmp_path).replace("|", " ").split("\n")[2:]) and "yes" not in table(tmp_path)
    master = tmp_path / "tests" / "distributed" / "test_master.py"
    master.write_text("@pytest.mark.gpu\ndef test_x(): ...\n")
    assert "yes" not in table(tmp_path)
    master.write_text("def test_x(): ...\n")
    (results / "gpu_suite.md").write_text(
        "# GPU suite\n\n2026-12-01 UTC, Python 3.12, 1 x NVIDIA H200 (140 GiB), CUDA 13.0\n\n"
        "| tests | 0 | 100 | `x` |\n| quickstart | 1 | 3 | `x` |\n"
    )
    run = {"benchmark": "throughput", "world_size": 8, "machine": {"device": "NVIDIA H200"}}
    (results / "throughput.json").write_text(json.dumps(run))
    rows = {line.split(" | ")[0].strip("| "): line for line in table(tmp_path).splitlines()[2:]}
    assert len(rows) == len(FEATURES)
    assert rows["the three-phase step in every layout"].endswith("| yes | yes, H200 | never run |")
    assert rows["quickstart: two phases, evaluation"].endswith("| never run | never run | never run |")
    assert rows["throughput against transformers"].endswith("| never run | never run | yes |")
