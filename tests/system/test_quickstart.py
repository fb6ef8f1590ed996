"""The quickstart's parts that need no training: its recipes, its promise, its drawings."""

import copy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples.quickstart import run
from examples.quickstart.drawings import draw_contact_sheet, draw_loss, moving_mean
from examples.quickstart.make_data import make_data
from megatron_vlm.config import load_config, validate

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def form(score: float, blank: float, baseline: float, count: int = 360) -> dict[str, Any]:
    return {
        "score": score, "blank_score": blank, "baseline_score": baseline, "num_questions": count,
        "baseline_answer": "two",
    }  # fmt: skip


GOOD = {"digit": form(0.97, 0.13, 0.13), "pair": form(0.6, 0.49, 0.45, 720), "parity": form(0.93, 0.54, 0.54)}


def test_what_is_promised():
    assert run.shortfalls(GOOD) == []
    assert run.headline(GOOD) == pytest.approx(0.95)  # the pair form does not count


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("parity", {"score": 0.92}, "held-out exact match: found 94.5%, needed 95%"),
        ("digit", {"score": 0.89}, "held-out digit questions: found 89.0%, needed 90%"),
        ("pair", {"blank_score": 0.51}, "pair questions with blanked images: found 51.0%, needed at most 50.0%"),
    ],
)
def test_what_falls_short_is_said(name, change, message):
    forms = copy.deepcopy(GOOD)
    forms[name].update(change)
    assert any(message in line for line in run.shortfalls(forms))


def test_the_last_line_is_the_headline(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "read_lines", lambda path: [{"images": ["images/0001.png"]}])
    run.say_results(GOOD, 300.0)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "held-out exact match: 95.0%"
    assert any(line.startswith("pair: 60.0% of 720; with blanked images 49.0%") for line in printed)
    assert any("tools/generate.py runs/quickstart/phase2 --media" in line for line in printed)


@pytest.mark.parametrize("phase", run.PHASES.values())
def test_recipes_are_valid_and_fit_the_data(phase, tmp_path):
    from megatron_vlm.data.text.conversation import TEMPLATES
    from megatron_vlm.data.text.tokenizer import load_tokenizer
    from megatron_vlm.evaluation.tasks import TASKS
    from megatron_vlm.models.facts import gather_facts

    recipe = load_config(RECIPES / f"quickstart_{phase}.yaml")
    facts = gather_facts(recipe, TEMPLATES.names(), TASKS.names())
    validate(recipe, facts, run.NUM_RANKS)
    make_data(tmp_path)
    assert len(load_tokenizer(tmp_path / "tokenizer", "<image>")) == facts.vocab_size
    assert {path.name for path in tmp_path.glob("eval_*.json")} == {f"eval_{form}.json" for form in run.FORMS}


def test_on_a_gpu_it_is_one_rank_and_some_overrides():
    """As examples/gpu_suite.sh asks for it."""
    from megatron_vlm.data.text.conversation import TEMPLATES
    from megatron_vlm.evaluation.tasks import TASKS
    from megatron_vlm.models.facts import gather_facts

    suite = (RECIPES.parent / "gpu_suite.sh").read_text()
    _, command = suite.split("examples/quickstart/run.py ")
    arguments = run.parse_arguments(command.partition(")")[0].split())
    assert arguments.ranks == 1 and run.torchrun(arguments.ranks)[-2:] == ["--nproc-per-node", "1"]
    for phase in run.PHASES.values():
        recipe = load_config(RECIPES / f"quickstart_{phase}.yaml", arguments.overrides)
        assert (recipe.runtime.device, recipe.precision.params) == ("cuda", "bf16")
        validate(recipe, gather_facts(recipe, TEMPLATES.names(), TASKS.names()), arguments.ranks)
    assert run.parse_arguments([]).ranks == run.NUM_RANKS


@pytest.mark.parametrize(("count", "num_wrong"), [(20, 3), (3, 0)])
def test_the_contact_sheet_takes_any_number_of_records(tmp_path, count, num_wrong):
    Image.new("RGB", (28, 28), (90, 90, 90)).save(tmp_path / "a.png")
    records = [
        {
            "form": "pair" if number % 2 else "digit", "images": ["a.png"] * (1 + number % 2), "question": "<image>?",
            "answer": "", "truth": "x", "score": float(number >= num_wrong),
        }
        for number in range(count)
    ]  # fmt: skip
    draw_contact_sheet(records, tmp_path, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height > 300 * (2 + bool(num_wrong))


def test_the_loss_curve(tmp_path):
    draw_loss({"one": [{"step": 1, "loss": 3.0}], "two": [{"step": 1, "loss": 2.0}]}, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").width > 500
    assert moving_mean([2.0, 4.0, 6.0]).tolist() == [2.0, 3.0, 4.0]
    assert moving_mean([0.0] * 5 + [1.0] * 20)[-1] == 1.0
