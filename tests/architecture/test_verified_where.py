"""README's table of what has run where is what the records of tests and benchmarks say now (DESIGN D15)."""

import json
from pathlib import Path

import pytest

from tests.helpers import verified_where
from tests.helpers.results import RECORD, Recorder, add
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


def test_the_table_follows_the_results_and_not_the_tests(tmp_path: Path) -> None:
    results = tmp_path / "docs" / "benchmarks"
    results.mkdir(parents=True)
    (tmp_path / "tests" / "distributed").mkdir(parents=True)
    names = ("master", "checkpoint", "evaluation", "generation")
    for name in names:
        (tmp_path / "tests" / "distributed" / f"test_{name}.py").write_text("def test_x(): ...\n")
    assert len(table(tmp_path).splitlines()) == 2 + len(FEATURES) and "yes" not in table(tmp_path)
    counts = {f"tests/distributed/test_{name}.py": {"passed": 1} for name in names}
    counts["tests/distributed/test_generation.py"]["failed"] = 1
    add(tmp_path / RECORD, counts, {"commit": "a1b2c3d"}, tmp_path)
    (results / "gpu_suite.md").write_text(
        "# GPU suite\n\n2026-12-01 UTC, Python 3.12, 1 x NVIDIA H200 (140 GiB), CUDA 13.0\n\n"
        "| tests | 0 | 100 | `x` |\n| quickstart | 1 | 3 | `x` |\n"
    )
    run = {"benchmark": "throughput", "world_size": 8, "machine": {"device": "NVIDIA H200"}}
    (results / "throughput.json").write_text(json.dumps(run))
    (results / "attention.json").write_text(json.dumps({"benchmark": "attention", "machine": {"device": "CPU"}}))
    rows = {line.split(" | ")[0].strip("| "): line for line in table(tmp_path).splitlines()[2:]}
    assert len(rows) == len(FEATURES)
    assert rows["the three-phase step in every layout"].endswith("| yes | yes, H200 | never run |")
    assert rows["quickstart: two phases, evaluation"].endswith("| no record | never run | never run |")
    assert rows["throughput against transformers"].endswith("| no record | never run | yes |")
    assert rows["attention over ranks that share a sequence"].endswith("| yes | never run | never run |")
    assert rows["checkpoints between layouts, exact resume"].endswith("| no record | never run | never run |")
    assert rows["answers, evaluation, in any layout"].endswith("| fails | never run | never run |")


def test_a_file_that_ran_again_or_has_gone_leaves_no_old_result(tmp_path: Path) -> None:
    record, kept, gone = tmp_path / "record.json", tmp_path / "test_kept.py", tmp_path / "test_gone.py"
    kept.touch()
    gone.touch()
    add(record, {"test_kept.py": {"failed": 2}, "test_gone.py": {"passed": 1}}, {"commit": "1"}, tmp_path)
    gone.unlink()
    add(record, {"test_kept.py": {"passed": 3, "skipped": 1}}, {"commit": "2"}, tmp_path)
    assert json.loads(record.read_text()) == {"test_kept.py": {"passed": 3, "failed": 0, "skipped": 1, "commit": "2"}}


def test_each_file_of_the_record_is_there() -> None:
    assert not [name for name in json.loads((ROOT / RECORD).read_text()) if not (ROOT / name).exists()]


def test_a_run_records_what_it_has_shown(tmp_path: Path) -> None:
    """Failures while setting up too, and a file that cannot be imported."""
    recorder = Recorder(tmp_path / "record.json")
    for when, outcome in (("setup", "failed"), ("setup", "passed"), ("call", "passed"), ("call", "failed")):
        report = pytest.TestReport("README.md::x", ("", 0, ""), {}, outcome, None, when)
        recorder.pytest_runtest_logreport(report)
    recorder.pytest_collectreport(pytest.CollectReport("README.md", "failed", None, []))
    recorder.pytest_sessionfinish()
    (found,) = json.loads((tmp_path / "record.json").read_text()).values()
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 3, 0) and found["commit"] and found["machine"]
