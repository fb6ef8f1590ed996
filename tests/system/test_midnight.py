"""Midnight, for a chat template that tells the date: real runs by a clock that is not ours to set.

Where the recipe fixes the day, a run over midnight, and one that is taken up again the next day, is the run before it,
bit for bit; where it does not, it is refused by name before the first step.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from megatron_vlm.config import to_yaml
from tests.helpers.data.chat_tokenizers import CLOCKED, of_bytes
from tests.helpers.models.tiny import tiny_llama, tiny_recipe
from tests.helpers.ranks.fake_clock import at
from tests.helpers.ranks.live_jobs import TRAIN, LiveJob, read_metrics
from tests.helpers.ranks.processes import ROOT, environment

BEFORE, AFTER = datetime(2026, 9, 30, 12), datetime(2026, 10, 1, 12)  # written out they have other lengths
LIMIT_SECONDS = 300.0
STEPS, SAVED = 8, 4


def write_recipe(folder: Path, **arguments: str) -> Path:
    tokenizer = of_bytes(folder / "clocked", CLOCKED)
    recipe = tiny_recipe(
        folder,
        model={"language": {"config": tiny_llama(300), "tokenizer": str(tokenizer)}},
        data={"num_workers": 1, "template_arguments": arguments},
        training={"sequence_length": 384, "global_batch_size": 4, "steps": STEPS},
        checkpoint={"every_steps": SAVED},
        logging={"ranks_every_steps": 0, "tensorboard": False},
    )
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return folder / "recipe.yaml"


def run(recipe: Path, name: str, clock: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a run that saves in the folder `name`."""
    command = [TRAIN, recipe, f"checkpoint.directory={recipe.parent / name}"]
    with LiveJob(recipe.parent / f"logs of {name}", command, inside=clock) as job:
        return job.process.wait(LIMIT_SECONDS), job.read("stderr.log")


def found(folder: Path) -> tuple[list[float], dict[str, str]]:
    """Every loss, and every file of tensors of the last checkpoint by its digest."""
    files = (folder / f"step_{STEPS:07d}").glob("*.distcp")
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return [line["loss"] for line in read_metrics(folder)], digests


def taken_up_from(folder: Path, name: str) -> None:
    """A copy of a run's folder as it was when its first checkpoint was written."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / f"step_{STEPS:07d}")
    (copy / "latest").write_text((copy / "latest").read_text().replace(f"{STEPS:07d}", f"{SAVED:07d}"))
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:SAVED]))


@pytest.mark.slow
def test_a_run_over_midnight_is_the_run_before_it(tmp_path: Path) -> None:
    recipe, hook = write_recipe(tmp_path, strftime_now="2026-03-05"), tmp_path / "hook"
    assert run(recipe, "one day", at(hook, BEFORE)) == (0, "")
    metrics = tmp_path / "over midnight" / "metrics.jsonl"
    assert run(recipe, "over midnight", at(hook, BEFORE, metrics, lines=1)) == (0, "")
    taken_up_from(tmp_path / "one day", "next day")
    assert run(recipe, "next day", at(hook, AFTER)) == (0, "")
    losses, digests = found(tmp_path / "one day")
    assert len(losses) == STEPS and digests
    assert found(tmp_path / "over midnight") == (losses, digests)
    assert found(tmp_path / "next day") == (losses, digests)
    assert len(list((tmp_path / "train.json.index").glob("*/contents.json"))) == 1  # none was made for another day
    assert "going on from" in (tmp_path / "logs of next day" / "stdout.log").read_text()


@pytest.mark.slow
def test_a_day_that_is_not_fixed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    code, told = run(recipe, "own", at(tmp_path / "hook", BEFORE))
    assert code == 1 and told.count("\n") == 1 and told.startswith("error: data.template is 'auto', but ")
    assert "it asks for the date (strftime_now), which changes every day" in told
    assert not list((tmp_path).glob("own/metrics.jsonl")) and not list(tmp_path.glob("own/step_*"))


def test_the_clock_is_that_of_every_process(tmp_path: Path) -> None:
    """Or the tests above would see one day only."""
    say = "import datetime, json, time; d = datetime.datetime; print(json.dumps([str(datetime.date.today()), "
    say += "d.now().strftime('%d %B %Y'), time.strftime('%d'), str(d.fromtimestamp(time.time()))[:10], "
    say += "isinstance(d(1, 1, 1), d)]))"
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {say!r}], check=True)"
    file = tmp_path / "lines"
    for lines, day in (("1\n", BEFORE), ("1\n2\n", AFTER)):
        file.write_text(lines)
        command = [*at(tmp_path / "hook", BEFORE, file, lines=2), sys.executable, "-c", inner]
        done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True)
        written = day.strftime("%Y-%m-%d")
        assert json.loads(done.stdout) == [written, day.strftime("%d %B %Y"), day.strftime("%d"), written, True]
