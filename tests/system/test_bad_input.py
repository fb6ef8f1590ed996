"""Bad input, end to end: one line on stderr, every process gone within 30 s, nothing half-written.

A table of what people do to a job and what they are told, over real processes with torchrun at two ranks and without.
"""

import hashlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from megatron_vlm.config import to_yaml
from tests.helpers.faults import spoiling
from tests.helpers.faults.spoiling import Spoil, with_overrides, with_records, with_step
from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.live_jobs import LiveJob
from tests.helpers.ranks.processes import ROOT

LIMIT_SECONDS = 300  # starting takes seconds, on a busy machine minutes
LEAVING_SECONDS = 30  # DESIGN 5: all processes of a failed job are gone this long after it failed
CHECKPOINT = r"FOLDER/checkpoints/step_0000002"
# What a run that fails may leave: the index of its data, which is whole, and the recipe and numbers of steps made.
MAY_BE_NEW = re.compile(
    r"(train\.json|lines\.jsonl)\.index(/.*)?|own(/(\.run|recipe\.yaml|[a-z]+\.jsonl?|tensorboard(/.*)?))?"
)


@dataclass(frozen=True)
class Ended:
    """How a job ended; stderr of our own processes, in rank order, without torchrun's report.

    Args:
        seconds_after_error: from the last words on stderr to the end of the last process.
        left_over: processes that did not end in time and were killed.
    """

    code: int
    stderr: str
    seconds_after_error: float
    left_over: list[psutil.Process]


def run_tool(
    logs: Path, tool: str, *arguments: str | Path | int, num_ranks: int = 1, largest_file_bytes: int | None = None
) -> Ended:
    """Runs a tool to its end, under torchrun where there are several ranks.

    Args:
        logs: a new folder for the output.
        largest_file_bytes: no process of the job can make a larger file, as on a full disk.
    """
    with LiveJob(logs, [ROOT / "tools" / tool, *map(str, arguments)], num_ranks) as job:
        if largest_file_bytes is not None:
            psutil.Process(job.process.pid).rlimit(psutil.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
        code = job.process.wait(LIMIT_SECONDS)
        spoken = [path.stat().st_mtime for path in job.own_logs.rglob("stderr.log") if path.stat().st_size]
        error_time = max(spoken, default=time.time())
        while (left_over := job.processes()) and time.time() < error_time + LEAVING_SECONDS:
            time.sleep(0.1)
        return Ended(code, job.read("stderr.log"), time.time() - error_time, left_over)


@dataclass(frozen=True)
class Case:
    """One mistake.

    Args:
        spoil: makes it in the job's folder.
        expected: pattern of the whole of stderr after "error: "; FOLDER stands for the job's folder.
        fast: the numbers of ranks with which the fast lane tries it.
        slow: the same of the slow lane.
        largest_file_bytes: what the disk has room for: tensors have more than a MiB, a tokenizer more than 8 KiB.
    """

    name: str
    spoil: Spoil
    expected: str
    fast: tuple[int, ...] = ()
    slow: tuple[int, ...] = (1, 2)
    largest_file_bytes: int | None = None


def markers(records: list[dict]) -> None:
    records[1]["conversations"][0]["value"] = "<image>\n<image>\nWhich?"


CASES = [
    Case(
        "unknown key",
        with_overrides("optimizer.lrr=1"),
        r"FOLDER/recipe\.yaml: optimizer\.lrr: unknown key, did you mean 'lr'\?",
        fast=(1,),
    ),
    Case(
        "heads not divisible",
        with_overrides("parallel.tensor=3"),
        r"parallel\.tensor \* parallel\.pipeline: found 3 \* 1 = 3, the world size [12] allows 1(, 2)?, or start a "
        r"multiple of 3 ranks \(torchrun --nproc-per-node\); parallel\.tensor: found 3, which does not divide the "
        r"language model's 4 attention heads and 2 key-value heads and 128 feed-forward channels, allowed: 1, 2",
        fast=(2,),
    ),
    Case(
        "world size",
        with_overrides("parallel.pipeline=4"),
        r"parallel\.tensor \* parallel\.pipeline: found 1 \* 4 = 4, the world size [12] allows 1(, 2)?, or start a "
        r"multiple of 4 ranks \(torchrun --nproc-per-node\)",
    ),
    Case(
        "missing data file",
        with_overrides("data.path={folder}/gone.json"),
        r"data file FOLDER/gone\.json cannot be read: No such file or directory",
    ),
    Case("malformed line", spoiling.malformed_line, r"FOLDER/lines\.jsonl line 4 is not JSON: .*", fast=(1,)),
    Case(
        "missing image",
        spoiling.missing_image,
        r"FOLDER/train\.json element 2: sample 'sample-2': image FOLDER/images/2-1\.png does not exist .*",
    ),
    Case(
        "truncated image",
        spoiling.truncated_image,
        r".*sample 'sample-2': image FOLDER/images/2-1\.png cannot be read: .*truncated.*",
        fast=(1,),
    ),
    Case(
        "more placeholders than images",
        with_records(markers),
        r"FOLDER/train\.json element 1 has 1 image\(s\) and 2 <image> in its text; .*",
    ),
    Case(
        "sample longer than the sequence",
        with_overrides("training.sequence_length=40"),
        r"FOLDER/train\.json element 19: sample 'sample-19' has 78 tokens, .*; training\.sequence_length is 40 .*",
    ),
    Case(
        "unknown projector",
        with_overrides("model.projector.type=mlp2x_gelo"),
        r"model\.projector\.type: found 'mlp2x_gelo', did you mean 'mlp2x_gelu'\?",
    ),
    Case(
        "named pipe for an image",
        spoiling.pipe_for_an_image,
        r"FOLDER/train\.json element 2: sample 'sample-2': image FOLDER/images/2-1\.png cannot be read: is a named .*",
    ),
    Case(
        "half a character in a record",
        spoiling.half_a_character,
        r"FOLDER/train\.json element 3 is not JSON: 'utf-8' codec can't decode .*",
    ),
    Case(
        "a chat template that does not end",
        spoiling.endless_template,
        r"FOLDER/train\.json element 3: sample 'sample-3': the chat template refuses it: it takes more than 10 s of "
        r"processor time \(data\.template auto, tokenizer 'FOLDER/tokenizer'\)",
    ),
    Case(
        "a regex that does not end",
        with_overrides("model.freeze=['^(([a-z_.0-9])+)+!$']"),
        r"model\.freeze\[0\]: found '\^\(\(\[a-z_\.0-9\]\)\+\)\+!\$', whose matching does not end: it takes more "
        r"than 2 s of processor time; needs one without nested repetitions.*",
    ),
    Case(
        "the environment in a recipe",
        lambda folder: ["data.path=${ oc.env:HOME}/x.json"],
        r"override 'data\.path=\$\{ oc\.env:HOME\}/x\.json': found '\$\{ oc\.env:HOME\}/x\.json', a recipe may "
        r"refer to its own keys only, as \$\{section\.key\}",
    ),
    Case(
        "pickled weights",
        spoiling.code_in_weights,
        r"FOLDER/tower/pytorch_model\.bin: its pickle is not plain tensors and could run code .*",
    ),
    Case(
        "code beside a config",
        spoiling.code_beside_the_config,
        r"model\.language\.path: no usable config in 'FOLDER/model': .*custom code.*",
        slow=(1,),
    ),
]
CHECKPOINT_CASES = [
    Case(
        "flipped byte",
        with_step(lambda step: spoiling.flip_byte(spoiling.tensors_file(step))),
        rf"checkpoint\.load: {CHECKPOINT} is damaged: __0_0\.distcp is not what was saved: .*",
    ),
    Case(
        "missing file",
        with_step(lambda step: spoiling.tensors_file(step).unlink()),
        rf"checkpoint\.load: {CHECKPOINT} is damaged: __0_0\.distcp is missing",
    ),
    Case(
        "truncated manifest",
        with_step(lambda step: (step / "manifest.json").write_text('{"step": 2,')),
        rf"{CHECKPOINT}/manifest\.json is damaged: .*",
    ),
    Case(
        "code in the metadata",
        with_step(spoiling.code_in_metadata),
        rf"{CHECKPOINT}/\.metadata would run posix\.mkdir when it is loaded, .*",
    ),
    Case(
        "code in common.pt",
        with_step(spoiling.code_in_common),
        rf"{CHECKPOINT}/common\.pt would run posix\.mkdir when it is loaded, .*",
        slow=(1,),
    ),
    Case(
        "code between tensors",
        with_step(spoiling.code_between_tensors),
        rf"{CHECKPOINT}/__0_0\.distcp would run posix\.mkdir when it is loaded, .*",
        slow=(1,),
    ),
    Case(
        "full disk at the tensors",
        with_step(lambda step: None, "checkpoint.every_steps=1"),
        r"checkpoint FOLDER/own/step_0000003 could not be written: .*File too large.*",
        largest_file_bytes=1 << 20,
    ),
    Case(
        "full disk at the tokenizer",
        with_step(lambda step: None, "checkpoint.every_steps=1"),
        r"checkpoint FOLDER/own/step_0000003 could not be written: .*File too large.*",
        largest_file_bytes=8192,
    ),
]


def launches(cases: list[Case]) -> list:
    """Cases with the numbers of ranks they run with: the fast lane's, and in the slow lane those left."""
    fast = [pytest.param(case, case.fast, id=case.name) for case in cases if case.fast]
    left = [(case, tuple(number for number in case.slow if number not in case.fast)) for case in cases]
    return fast + [
        pytest.param(case, ranks, id=f"{case.name} on {' and '.join(map(str, ranks))}", marks=pytest.mark.slow)
        for case, ranks in left
    ]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that has not run."""
    folder = tmp_path_factory.mktemp("untrained")
    (folder / "recipe.yaml").write_text(to_yaml(tiny_recipe(folder, checkpoint={"directory": str(folder / "own")})))
    return folder


@pytest.fixture(scope="module")
def trained(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after two updates, saved in checkpoints/."""
    folder = copy_job(untrained, tmp_path_factory.mktemp("trained") / "job")
    overrides = ("training.steps=2", f"checkpoint.directory={folder}/checkpoints")
    ended = run_tool(folder.parent / "logs", "train.py", folder / "recipe.yaml", *overrides)
    assert (ended.code, ended.stderr) == (0, "")
    return folder


def copy_job(folder: Path, to: Path) -> Path:
    """A copy of a job whose recipe names the copy's own files."""
    shutil.copytree(folder, to)
    recipe = to / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(folder), str(to)))
    return to


def contents(folder: Path) -> dict[str, str]:
    """Every file and directory under `folder`, files with their hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def check_contract(ended: Ended, expected: str, folder: Path) -> None:
    """DESIGN 5: one line, a code, and nobody left."""
    assert ended.code != 0
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert re.fullmatch("error: " + expected.replace("FOLDER", re.escape(str(folder))) + "\n", ended.stderr), (
        ended.stderr
    )
    assert not ended.left_over
    assert ended.seconds_after_error < LEAVING_SECONDS


def check_case(case: Case, job: Path, tmp_path: Path, num_ranks: int) -> None:
    folder = copy_job(job, tmp_path / f"ranks{num_ranks}")
    overrides = case.spoil(folder)
    before = contents(folder)
    ended = run_tool(
        tmp_path / f"logs{num_ranks}",
        "train.py",
        folder / "recipe.yaml",
        *overrides,
        num_ranks=num_ranks,
        largest_file_bytes=case.largest_file_bytes,
    )
    check_contract(ended, case.expected, folder)
    after = contents(folder)
    assert "ran" not in after, "planted code was run"
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after.keys() - before.keys() if not MAY_BE_NEW.fullmatch(name)]


def check_together(case: Case, job: Path, tmp_path: Path, ranks: tuple[int, ...]) -> None:
    """The launches side by side: most of a run is waiting for imports."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda number: check_case(case, job, tmp_path, number), ranks))


@pytest.mark.parametrize(("case", "ranks"), launches(CASES))
def test_a_job_that_was_never_run(case: Case, ranks: tuple[int, ...], untrained: Path, tmp_path: Path) -> None:
    check_together(case, untrained, tmp_path, ranks)


@pytest.mark.parametrize(("case", "ranks"), launches(CHECKPOINT_CASES))
def test_a_job_that_goes_on_from_a_checkpoint(
    case: Case, ranks: tuple[int, ...], trained: Path, tmp_path: Path
) -> None:
    check_together(case, trained, tmp_path, ranks)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MiB: one checkpoint fits, two do not."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted ({mounted.stderr.strip()}); the cases 'full disk' limit files instead")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_disk_that_fills_up(num_ranks: int, untrained: Path, small_disk: Path, tmp_path: Path) -> None:
    overrides = (f"checkpoint.directory={small_disk}/run", "checkpoint.every_steps=1")
    ended = run_tool(tmp_path / "logs", "train.py", untrained / "recipe.yaml", *overrides, num_ranks=num_ranks)
    check_contract(ended, r".*could not be written: .*No space left on device.*", untrained)
    steps = [path.name for path in (small_disk / "run").iterdir() if path.is_dir() and path.name != "tensorboard"]
    assert steps == ["step_0000001"]
    again = run_tool(
        tmp_path / "again",
        "generate.py", small_disk / "run", "--prompt", "Red?", "--max-new-tokens", 2,
    )  # fmt: skip
    assert (again.code, again.stderr) == (0, "")


TRAIN_LINES = [
    ("nowhere.yaml", r"nowhere\.yaml: cannot be read: No such file or directory"),
    ("FOLDER/recipe.yaml --stepps 3", r"unrecognized arguments: --stepps 3 \(train\.py --help shows what there is\)"),
    ("", r"the following arguments are required: recipe \(train\.py --help shows what there is\)"),
]


@pytest.mark.parametrize(("line", "expected"), TRAIN_LINES)
def test_command_lines_of_training(line: str, expected: str, untrained: Path, tmp_path: Path) -> None:
    ended = run_tool(tmp_path / "logs", "train.py", *line.replace("FOLDER", str(untrained)).split())
    check_contract(ended, expected, untrained)


QUESTIONS = "--task exact_match --data FOLDER/train.json"
ANSWER_LINES = [  # checkpoints/ is whole, damaged/ is not, and an image is gone
    ("generate.py nowhere --prompt ?", r"no checkpoint at nowhere: nowhere is not a directory"),
    ("generate.py FOLDER/damaged --prompt ?", r"FOLDER/damaged/step_0000002 is damaged: __0_0\.distcp is not what .*"),
    ("generate.py FOLDER/checkpoints --prompt ? --media gone.png", r"prompt 1: image 'gone\.png' does not exist"),
    (f"evaluate.py nowhere {QUESTIONS}", r"no checkpoint at nowhere: nowhere is not a directory"),
    (
        f"evaluate.py FOLDER/damaged {QUESTIONS}",
        r"FOLDER/damaged/step_0000002 is damaged: __0_0\.distcp is not what .*",
    ),
    (
        f"evaluate.py FOLDER/checkpoints {QUESTIONS}",
        r"FOLDER/train\.json element 2: .*/2-1\.png does not exist.*",
    ),
    (
        "evaluate.py FOLDER/checkpoints --task exact_mach --data FOLDER/train.json",
        r"unknown evaluation task 'exact_mach'; did you mean 'exact_match'\?",
    ),
    (
        "evaluate.py FOLDER/checkpoints --task exact_match --data FOLDER/gone.json",
        r"data file FOLDER/gone\.json cannot be read: No such file or directory",
    ),
]


@pytest.mark.slow
def test_command_lines_that_ask_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    folder = copy_job(trained, tmp_path / "job")
    shutil.copytree(folder / "checkpoints", folder / "damaged")
    spoiling.flip_byte(spoiling.tensors_file(folder / "damaged" / "step_0000002"))
    spoiling.missing_image(folder)
    before = contents(folder)

    def check(number: int) -> None:
        line, expected = ANSWER_LINES[number]
        ended = run_tool(tmp_path / f"logs{number}", *line.replace("FOLDER", str(folder)).split())
        check_contract(ended, expected, folder)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, range(len(ANSWER_LINES))))
    assert contents(folder) == before
