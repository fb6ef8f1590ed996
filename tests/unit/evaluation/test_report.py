"""The numbers beside each form, and the files they are written to."""

import json
import os

import pytest

from megatron_vlm.errors import DataError
from megatron_vlm.evaluation.report import Record, make_report
from megatron_vlm.evaluation.tasks import exact_match


def records(*answers_and_truths: tuple[str, str, str]) -> list[Record]:
    """From (form, answer, truth)."""
    return [
        Record(number, f"id{number}", form, (), "?", answer, truth, exact_match(answer, truth))
        for number, (form, answer, truth) in enumerate(answers_and_truths)
    ]


SEEN = records(("b", "yes", "yes"), ("a", "x", "x"), ("b", "no", "yes"), ("b", "no", "no"), ("a", "x", "é"))
BLANKED = records(("b", "no", "yes"), ("a", "x", "x"), ("b", "no", "yes"), ("b", "no", "no"), ("a", "y", "é"))


def test_scores_per_form_stand_beside_what_blindness_and_habit_give():
    report = make_report("exact_match", exact_match, SEEN, BLANKED)
    a, b = report.forms
    assert (a.form, a.num_questions, a.score, a.blank_score) == ("a", 2, 0.5, 0.5)
    assert (b.form, b.num_questions, b.score) == ("b", 3, pytest.approx(2 / 3))
    assert b.blank_score == pytest.approx(1 / 3)
    assert (b.baseline_answer, b.baseline_score) == ("yes", pytest.approx(2 / 3))
    assert report.score == pytest.approx(3 / 5)


def test_what_was_not_asked_blank_has_no_blank_score(tmp_path):
    report = make_report("exact_match", exact_match, SEEN, [])
    report.write(tmp_path / "new")
    assert {form.blank_score for form in report.forms} == {None}
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["exact_match.json", "exact_match.jsonl"]


def test_files(tmp_path):
    make_report("exact_match", exact_match, SEEN, BLANKED).write(tmp_path)
    summary = json.loads((tmp_path / "exact_match.json").read_text())
    assert summary["num_questions"] == 5 and summary["score"] == pytest.approx(0.6)
    assert summary["forms"]["b"]["baseline_answer"] == "yes"
    lines = [json.loads(line) for line in (tmp_path / "exact_match.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["answer"] for line in lines] == ["yes", "x", "no", "no", "x"] and lines[4]["truth"] == "é"
    blank = (tmp_path / "exact_match_blank.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(blank[4])["answer"] == "y"


def test_a_pipe_in_a_results_place_is_replaced_and_not_waited_for(tmp_path):
    for name in ("exact_match.json", ".exact_match.json.partial"):
        os.mkfifo(tmp_path / name)
    make_report("exact_match", exact_match, SEEN, []).write(tmp_path)
    assert json.loads((tmp_path / "exact_match.json").read_text())["num_questions"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exact_match.json", "exact_match.jsonl"]


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written to .*file/results"):
        make_report("exact_match", exact_match, SEEN, []).write(tmp_path / "file" / "results")
