"""docs/coming-from.md: every row has an answer, and every answer is one that this version takes (DESIGN D15).

The commands themselves are checked with the README's in test_commands.py.
"""

import re

import pytest

from megatron_vlm.config import load_config
from megatron_vlm.data.sample import Sample
from megatron_vlm.data.sources.llava_json import parse_record
from megatron_vlm.errors import ConfigError
from tests.architecture.documents import exists, named_paths
from tests.architecture.sources import ROOT

TEXT = (ROOT / "docs" / "coming-from.md").read_text()
RECIPE = ROOT / "examples" / "recipes" / "llava_qwen2_7b_phase2.yaml"
REFUSALS = ("not taken, because", "not yet")
OVERRIDE = re.compile(r"`([a-z_]+(?:\.[a-z_]+)+=[^`]+)`")


def rows(text: str) -> list[tuple[str, str]]:
    """(there, here) of every table."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| there")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert all(len(row) == 2 for row in cells), [row for row in cells if len(row) != 2]
    return [(row[0], row[1]) for row in cells]


def answered(here: str) -> bool:
    """A reason for there being nothing, or something to type or read."""
    return here.startswith(REFUSALS) or "`" in here or here.startswith(("the same", "always", "found"))


def refused(override: str) -> str | None:
    """Why a shipped recipe would not take the override."""
    try:
        load_config(RECIPE, [override])
    except ConfigError as error:
        return f"{override}: {error}"
    return None


def test_every_row_has_an_answer() -> None:
    found = rows(TEXT)
    assert len(found) > 60
    assert not [there for there, here in found if not answered(here)]
    assert not answered("soon")


def test_every_key_takes_the_value_shown() -> None:
    overrides = sorted(set(OVERRIDE.findall(TEXT)) - {"section.key=value"})
    assert len(overrides) > 40
    wrong = [fault for override in overrides if (fault := refused(override))]
    assert not wrong, "\n".join(wrong)
    assert refused("optimizer.lr=fast") and refused("optimizer.learning_rate=1")


def test_what_is_named_here_exists() -> None:
    answers = "\n".join(here for _, here in rows(TEXT))
    paths = {path for path in named_paths(answers) if not path.startswith("runs/")}
    assert len(paths) > 10
    missing = sorted(path for path in paths if not exists(path))
    assert not missing, missing


@pytest.mark.parametrize("record", re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL))
def test_the_records_are_read(record: str) -> None:
    sample = parse_record(record.encode(), "docs/coming-from.md", "0", "<image>")
    assert isinstance(sample, Sample) and sample.turns[-1].role == "assistant"
