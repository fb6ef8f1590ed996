"""When an answer counts as right."""

import pytest

from megatron_vlm.errors import ConfigError
from megatron_vlm.evaluation.tasks import TASKS, exact_match


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("seven", "seven", 1.0),
        (" The  First.", "the first", 1.0),
        ("YES!", "yes", 1.0),
        ("the second", "the first", 0.0),
        ("seven seven", "seven", 0.0),
        ("", "seven", 0.0),
        ("3.5", "35", 0.0),
    ],
)
def test_exact_match(answer, truth, score):
    assert exact_match(answer, truth) == score


def test_an_unknown_task_names_the_near_one():
    assert TASKS.get("exact_match") is exact_match
    with pytest.raises(ConfigError, match="unknown evaluation task 'exact_mach'; did you mean 'exact_match'"):
        TASKS.get("exact_mach")
