"""What is wrong with a run in several places is told together, before a weight exists; unreadable keys come first."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import to_yaml
from megatron_vlm.errors import DataError, MegatronVlmError, RecipeError, faults_of
from megatron_vlm.training.preflight import _of_ranks
from tests.helpers.faults import spoiling
from tests.helpers.faults.spoiling import Spoil, with_overrides
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.live_jobs import TRAIN, LiveJob
from tests.helpers.ranks.pool import RankPool

LIMIT_SECONDS = 300.0
BUILT = "trainable parameters on this rank"  # said when a model is built


def endless(folder: Path) -> list[str]:
    """A template that no record of the file gets through."""
    settings = folder / "tokenizer" / "tokenizer_config.json"
    program = "{% if messages|length > 1 %}{{ raise_exception('never') }}{% endif %}{{ messages[0]['content'] }}"
    (folder / "tokenizer" / "chat_template.jinja").unlink(missing_ok=True)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": program}))
    return ["parallel.tensor=3"]


def all_at_once(folder: Path) -> list[str]:
    return [
        "model.projector.type=mlp2x_gelo", f"model.language.tokenizer={folder}/gone",
        f"data.path={folder}/gone.json", "training.mode=train_and_eval", f"evaluation.path={folder}/lost.json",
    ]  # fmt: skip


def keys(folder: Path) -> list[str]:
    """Keys that cannot be read are told alone: without them the recipe is not what its writer means."""
    return ["training.sequence_length=2k", "optimizer.lrr=1", "parallel.tensor=3", f"data.path={folder}/gone.json"]


def rules(folder: Path) -> list[str]:
    """All rules that are broken, whether they need the model or not, and the data."""
    return ["parallel.tensor=3", "checkpoint.load_states=model", f"data.path={folder}/gone.json"]


def nothing_to_read(folder: Path) -> list[str]:
    """Neither tower nor language model; the rules that need none of them speak."""
    model = ["model.language.config=null", "model.vision.config=null"]
    paths = [f"model.language.path={folder}/no/llm", f"model.vision.path={folder}/no/tower"]
    return [*model, *paths, "checkpoint.load_states=model"]


CASES = {
    "all at once": (
        all_at_once,
        [
            r"model\.projector\.type: found 'mlp2x_gelo', did you mean 'mlp2x_gelu'\?",
            r"model\.language\.tokenizer: found 'FOLDER/gone', which is not there, needs a directory or a hub id",
            r"data file FOLDER/gone\.json cannot be read: No such file or directory",
            r"data file FOLDER/lost\.json cannot be read: No such file or directory",
        ],
    ),
    "recipe and template": (
        endless,
        [
            r"parallel\.tensor \* parallel\.pipeline: found 3 \* 1 = 3, the world size . allows .*",
            r"parallel\.tensor: found 3, which does not divide .*",
            r"FOLDER/train\.json element 0: sample 'sample-0': the chat template refuses it: never .*",
        ],
    ),
    "recipe and images": (
        lambda folder: [*spoiling.missing_image(folder), "parallel.virtual_pipeline=2"],
        [
            r"parallel\.virtual_pipeline: found 2 with parallel\.pipeline 1, .*",
            r"FOLDER/train\.json element 2: sample 'sample-2': image FOLDER/images/2-1\.png does not exist .*",
        ],
    ),
    "keys": (
        keys,
        [
            r"FOLDER/recipe\.yaml: optimizer\.lrr: unknown key, did you mean 'lr'\?; "
            r"training\.sequence_length: found '2k', .*"
        ],
    ),
    "rules": (
        rules,
        [
            r"checkpoint\.load_states: found model with checkpoint\.load null, .*",
            r"parallel\.tensor \* parallel\.pipeline: found 3 \* 1 = 3, the world size . allows .*",
            r"parallel\.tensor: found 3, which does not divide .*",
            r"data file FOLDER/gone\.json cannot be read: No such file or directory",
        ],
    ),
    "no models": (  # all of it the recipe's, which is one line
        nothing_to_read,
        [
            r"model\.language\.path: found 'FOLDER/no/llm', which is not there, .*; "
            r"model\.vision\.path: found 'FOLDER/no/tower', which is not there, .*; "
            r"checkpoint\.load_states: found model with checkpoint\.load null, .*",
        ],
    ),
}
ALONE = {
    "an image that is cut off": (spoiling.truncated_image, r".*sample 'sample-2': image .* cannot be read: .*"),
    "a sample that is too long": (
        with_overrides("training.sequence_length=40"),
        r"FOLDER/train\.json element 19: sample 'sample-19' has 78 tokens, .*; training\.sequence_length is 40 .*",
    ),
}


def train_spoilt(tmp_path: Path, spoil: Spoil, num_ranks: int) -> tuple[list[str], str]:
    """Lines on stderr, FOLDER for the job's, and what is said on stdout, of a job that fails."""
    folder = tmp_path / "job"
    recipe = tiny_recipe(folder, checkpoint={"directory": str(folder / "own")})
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    with LiveJob(tmp_path / "logs", [TRAIN, folder / "recipe.yaml", *spoil(folder)], num_ranks) as job:
        assert job.process.wait(LIMIT_SECONDS) != 0
        assert not (folder / "own" / "metrics.jsonl").exists()
        return job.read("stderr.log").replace(str(folder), "FOLDER").splitlines(), job.read("stdout.log")


LAUNCHES = [(name, 1) for name in ("all at once", "keys", "rules")]
LAUNCHES += [pytest.param(name, 2, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize(("name", "num_ranks"), LAUNCHES)
def test_each_fault_is_a_line_of_its_own(tmp_path: Path, name: str, num_ranks: int) -> None:
    spoil, expected = CASES[name]
    lines, said = train_spoilt(tmp_path, spoil, num_ranks)
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(f"error: {pattern}", line), line
    assert BUILT not in said


def test_the_docstring_shows_what_is_told(ranks: RankPool, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, parallel={"virtual_pipeline": 2}, data={"path": "gone.json"})
    tree = recipe.model_dump(mode="json")
    tree["model"]["language"]["tokenizer"] = "data/gone/tokenizer"
    ((told, shown),) = ranks.run(1, told_and_shown, tree)
    assert [f"error: {line}" for line in told] == shown


def told_and_shown(recipe: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Inside a rank: the faults of a recipe, and the example in the module's docstring."""
    from megatron_vlm.config.schema import Config
    from megatron_vlm.training import preflight

    with pytest.raises(MegatronVlmError) as caught:
        preflight.settle_run(Config.model_validate(recipe), 1, 1, resumes=False, opens_data=True)
    return list(faults_of(caught.value)), re.findall(r"^    (error: .*)$", preflight.__doc__ or "", re.MULTILINE)


def test_what_not_all_ranks_found_is_told_with_those_that_did() -> None:
    gone, wrong = DataError("tokenizer gone"), RecipeError(["a.b: found 1", "c.d: found 2"])
    assert str(_of_ranks([[wrong], [wrong]])) == str(wrong)
    found = _of_ranks([[], [gone], [wrong, gone]])
    assert faults_of(found) == ("tokenizer gone (rank 1, 2)", "a.b: found 1 (rank 2)", "c.d: found 2 (rank 2)")


@pytest.mark.slow
def test_a_run_that_is_done_needs_no_data(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, training={"steps": 1}, checkpoint={"directory": str(tmp_path / "own")})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    for number, told in enumerate(["", "nothing to do"]):
        with LiveJob(tmp_path / f"logs{number}", [TRAIN, tmp_path / "recipe.yaml"]) as job:
            assert job.process.wait(LIMIT_SECONDS) == 0, job.read("stderr.log")
            assert told in job.read("stdout.log")
        (tmp_path / "train.json").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_the_data_is_looked_at_before_the_model_is_built(tmp_path: Path, name: str) -> None:
    spoil, expected = ALONE[name]
    lines, said = train_spoilt(tmp_path, spoil, num_ranks=1)
    assert len(lines) == 1 and re.fullmatch(f"error: {expected}", lines[0]), lines
    assert BUILT not in said


def test_the_first_records_of_a_large_file_come_at_once(tmp_path: Path) -> None:
    """A list and lines, cut in the middle of a record, and a fault far behind, which is left to the index."""
    from megatron_vlm.data.sources import keys_of
    from megatron_vlm.data.sources.json_files import FIRST_BYTES
    from megatron_vlm.data.sources.llava_json import LlavaJson

    turns = [{"from": "human", "value": "?" * 100_000}, {"from": "gpt", "value": "!"}]
    records = [json.dumps({"id": str(number), "conversations": turns}) for number in range(FIRST_BYTES // 90_000)]
    broken = [*records[:-1], "{"]
    for text in (f"[{','.join(broken)}]", "\n".join(broken)):
        path = tmp_path / "large.json"
        path.write_text(text)
        started = time.monotonic()
        file = LlavaJson(path, "<image>")
        first = file.first(3)
        assert [file.sample(key).id for key in keys_of(first)] == ["0", "1", "2"]
        whole = [file.sample(key).id for key in keys_of(file.first(10_000))]
        assert whole == [str(number) for number in range(len(whole))] and 30 < len(whole) < len(records)
        assert time.monotonic() - started < 5.0
