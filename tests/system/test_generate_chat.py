"""tools/generate.py in a conversation and with sampling, as a process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.models.tiny import tiny_dataset, tiny_tokenizer
from tests.helpers.ranks.processes import ROOT, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT_SECONDS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of another system in `hf`, and images."""
    from tests.helpers.models.verify_models import Shape, draw, save_llava_hf, save_llava_projector

    folder = tmp_path_factory.mktemp("chat")
    save_llava_hf(draw(Shape()), folder / "hf")
    save_llava_projector(folder / "vila", "mlp_downsample")
    tiny_tokenizer(folder), tiny_dataset(folder)
    return folder


def generate(folder: Path, *arguments: object, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "generate.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment(), input=lines, capture_output=True, text=True, timeout=LIMIT_SECONDS,
        check=False, errors="surrogateescape",
    )  # fmt: skip


def test_a_conversation_keeps_images_and_turns(folder: Path) -> None:
    image = "images/1-0.png"
    lines = f"far?\n\n/media gone.png\nnear?\n/media {image}\nwhich <image>?\nred?\n"
    done = generate(folder, "hf", "--chat", "--media", image, "--max-new-tokens", 5, lines=lines)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: prompt 1: image 'gone.png' does not exist\n"
    assert done.stdout.count("\n") == 3, done.stdout
    first = generate(folder, "hf", "--media", image, "--prompt", "far?", "--max-new-tokens", 5)
    assert done.stdout.splitlines()[0] == first.stdout.rstrip("\n")


def test_a_line_that_is_no_utf_8_costs_a_line(folder: Path) -> None:
    lines = b"far\xff?\n/media \xff.png\nnear?\nred?\n".decode("utf-8", "surrogateescape")
    done = generate(folder, "hf", "--chat", "--max-new-tokens", 5, lines=lines)
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done
    first, second = done.stderr.splitlines()
    assert first.startswith("error: prompt 1: found ") and "\\udcff" in first and "Traceback" not in first
    assert second.startswith("error: prompt ") and second.endswith(r"image '\udcff.png' does not exist"), second


def test_the_order_of_squares_is_told_to_every_rank(folder: Path) -> None:
    question = ["vila", "--media", "images/1-0.png", "--prompt", "far?", "--max-new-tokens", 8]
    untold = generate(folder, *question)
    assert untold.returncode == 1 and untold.stdout == "" and untold.stderr.count("\n") == 1
    assert untold.stderr.startswith("error: vila/config.json: mm_projector_type is 'mlp_downsample'"), untold.stderr
    told = {
        order: generate(folder, *question, "--format-option", f"downsample_order={order}")
        for order in ("column", "row")
    }
    ranks = generate(folder, *question, "--format-option", "downsample_order=row", "--devices", "cpu", "cpu")
    for done in (*told.values(), ranks):
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert ranks.stdout == told["row"].stdout != told["column"].stdout


def test_draws_repeat_with_their_seed(folder: Path) -> None:
    question = ["hf", "--prompt", "far?", "--temperature", "2", "--top-k", "50", "--top-p", "0.9", "--seed"]
    once, again, other = (generate(folder, *question, seed).stdout for seed in (1, 1, 2))
    assert once and once == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "?", "--top-k", "3"], "error: top_k: found 3 with temperature 0, where nothing is drawn"),
        (["--prompt", "?", "--stop", ""], "error: stop: found an empty string"),
        (["--prompt", "?", "--temperature", "warm"], "error: argument --temperature: found 'warm', needs a number"),
        (["--prompt", "?", "--devices", "gpu"], "error: argument --devices: found 'gpu', needs a GPU's number or cpu"),
        ([], "error: --prompt: missing; give a question, or --chat"),
    ],
)
def test_bad_options_cost_one_line(folder: Path, arguments: list[str], message: str) -> None:
    done = generate(folder, "hf", *arguments)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
