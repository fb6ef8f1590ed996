"""Every decision, trap, rule and page that code or a document cites is there to be read (DESIGN D15)."""

from pathlib import Path

import pytest

from tests.architecture.citations import citations, cited_files, faults, headings
from tests.architecture.sources import ROOT

PLANTED = (  # faults that must be found
    "tests/architecture/test_citations.py",
    "tests/architecture/citations.py",
    "tests/architecture/test_documents.py",
)


def test_every_citation_has_its_heading() -> None:
    files = [path for path in cited_files() if str(path) not in PLANTED]
    wrong = [f"{path}: {fault}" for path in files for fault in faults((ROOT / path).read_text(), (ROOT / path).parent)]
    assert not wrong, "\n".join(wrong)
    found = {citation for path in files if path.suffix == ".py" for citation in citations((ROOT / path).read_text())}
    assert len(found) > 20, found
    assert {kind for kind, _ in found} == {"DESIGN", "traps", "STYLE", "decisions"}


def test_headings_are_found() -> None:
    assert {"D1", "D15", "2", "5", "6"} <= headings("DESIGN") and "D99" not in headings("DESIGN")
    assert "B8" in headings("traps") and {"1", "12"} <= headings("STYLE") and "0001" in headings("decisions")


def test_every_form_is_read() -> None:
    text = "so (DESIGN D5,\nD6), by DESIGN 5; traps B8, STYLE 4, docs/decisions/0006-keys.md"
    found = [("DESIGN", "D5"), ("DESIGN", "D6"), ("DESIGN", "5"), ("traps", "B8"), ("STYLE", "4")]
    assert list(citations(text)) == [*found, ("decisions", "0006")]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("see DESIGN D99", "DESIGN D99 has no heading"),
        ("see DESIGN D5, D98", "DESIGN D98 has no heading"),
        ("traps Z9 bites", "traps Z9 has no heading"),
        ("STYLE 77", "STYLE 77 has no heading"),
        ("docs/decisions/9999 says", "decisions 9999 has no heading"),
        ("as DESIGN's tolerances", "'DESIGN' is not one of the forms of a citation"),
        ("that is D12's rule", "'D12' is not one of the forms of a citation"),
        ("decision 0009 says", "'decision 0009' is not one of the forms of a citation"),
        ("docs/none.md has it", "docs/none.md is not there"),
        ("what issue 4 asks", "'what issue 4' is no part of the product"),
    ],
)
def test_the_rule_can_fail(text: str, fault: str) -> None:
    assert list(faults(text)) == [fault]


@pytest.mark.parametrize("text", ["pytorch/pytorch issue 135712", "`<style>`", "runs/x/README.md", "a design, by D1x"])
def test_what_is_no_citation_passes(text: str) -> None:
    assert not list(faults(text))


def test_files_of_every_kind_are_read() -> None:
    files = {str(path) for path in cited_files()}
    assert {"megatron_vlm/training/step.py", "docs/fp8.md", "README.md", "Makefile", "examples/gpu_suite.sh"} <= files
    assert Path("docs/design.md") in cited_files()
