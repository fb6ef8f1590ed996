"""The command lines on real processes: train, generate, evaluate; and bad input, which costs one line on stderr."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.config import to_yaml
from tests.helpers.models.tiny import tiny_dataset, tiny_recipe
from tests.helpers.ranks.tool_runs import tool, tool_on_ranks, warm_tool


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where tools/train.py has trained two steps; its checkpoints are in checkpoints/."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "recipe.yaml"
    recipe.write_text(to_yaml(tiny_recipe(folder, training={"steps": 5})))
    done = tool("train.py", recipe, "training.steps=2")
    assert done.code == 0 and done.stderr == "", done.stderr
    assert "saved" in done.stdout
    return folder


def test_a_forked_command_ends_as_an_interpreter_does(tmp_path: Path) -> None:
    """Its threads come to their end, then what is registered for the end, then the code."""
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, sys, threading, time\natexit.register(lambda: print('last'))\n"
        "threading.Thread(target=lambda: (time.sleep(0.5), print('thread'))).start()\nsys.exit('no')\n"
    )
    for done in (tool(str(script)), warm_tool(str(script))):  # of an absolute path nothing is put before it
        assert (done.code, done.stdout, done.stderr) == (1, "thread\nlast\n", "no\n")


def test_generate_prints_the_answer_and_nothing_else(run):
    media = [run / "images" / "1-0.png", run / "images" / "2-0.png"]
    done = tool("generate.py", run / "checkpoints", "--media", *media, "--prompt", "Red?", "--max-new-tokens", 5)
    assert done.code == 0 and done.stderr == ""
    assert done.stdout.strip() and done.stdout.count("\n") == 1


@pytest.mark.slow
def test_generate_on_two_tensor_ranks_gives_the_same_answer_once(run, tmp_path):
    question = ["generate.py", run / "checkpoints", "--media", run / "images" / "1-0.png", "--prompt", "Far green?"]
    alone = tool(*question, "--max-new-tokens", 6)
    done = tool_on_ranks(2, tmp_path, *question, "--max-new-tokens", 6, "--tensor", 2)
    assert done.code == 0 and done.stderr == "", done.stderr
    assert done.stdout == alone.stdout and done.stdout.count("\n") == 1


@pytest.mark.slow
def test_evaluate_gives_the_same_records_in_any_layout(run, tmp_path):
    question = ["evaluate.py", run / "checkpoints", "--task", "exact_match", "--data", tiny_dataset(run, 7, "any.json")]
    for number, layout in enumerate([[], ["--tensor", 2, "--pipeline", 2]]):
        folder = tmp_path / str(number)
        options = [*layout, "--output", folder, "--max-new-tokens", 4]
        done = tool_on_ranks(4, folder / "logs", *question, *options)
        assert done.code == 0 and done.stderr == "", done.stderr
    shared, split = [(tmp_path / f"{number}" / "exact_match.jsonl").read_text() for number in range(2)]
    assert shared.count("\n") == 7 and split == shared


@pytest.mark.parametrize(
    ("layout", "expected"),
    [(["--tensor", 3], "error: parallel.tensor * parallel.pipeline: found 3 * 1 = 3"), (["--pipeline", 0], "error: ")],
)
def test_a_layout_that_does_not_fit_costs_one_line(run, layout, expected):
    done = warm_tool("generate.py", run / "checkpoints", "--prompt", "?", *layout)
    assert done.code != 0 and done.stdout == ""
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_evaluate_on_two_ranks_writes_and_prints_its_numbers(run, tmp_path):
    data = [tiny_dataset(run, 5, "first.json"), tiny_dataset(run, 4, "second.json")]
    done = tool_on_ranks(
        2, tmp_path / "logs", "evaluate.py", run / "checkpoints", "--task", "exact_match", "--data", *data,
        "--blank-images", "--max-new-tokens", 4,
    )  # fmt: skip
    assert done.code == 0 and done.stderr == "", done.stderr
    assert "images blanked" in done.stdout and done.stdout.count("of 9 questions") == 1
    results = run / "checkpoints" / "evaluation"
    assert json.loads((results / "exact_match.json").read_text())["num_questions"] == 9
    assert len((results / "exact_match_blank.jsonl").read_text().splitlines()) == 9


@pytest.mark.slow
def test_a_question_beyond_the_context_is_found_before_anything_is_asked(run, tmp_path):
    record = json.loads(tiny_dataset(run, 6, "long.json").read_text())
    record[4]["conversations"][-2]["value"] += " how" * 300  # of 256 positions
    (run / "long.json").write_text(json.dumps(record))
    question = ["--task", "exact_match", "--data", run / "long.json", "--output", tmp_path / "results"]
    for ranks in (1, 2):
        done = tool_on_ranks(ranks, tmp_path / str(ranks), "evaluate.py", run / "checkpoints", *question)
        assert done.code != 0 and "exact_match" not in done.stdout, done.stdout
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert "long.json element 4: sample 'sample-4': its question has 3" in done.stderr
        assert "max_position_embeddings) is 256" in done.stderr
        assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_a_failing_rank_ends_the_evaluation_with_one_line(run, tmp_path):
    record = json.loads(tiny_dataset(run, 2, "bad.json").read_text())
    record[1]["image"] = "images/gone.png"  # rank 1's only question
    (run / "bad.json").write_text(json.dumps(record))
    done = tool_on_ranks(
        2, tmp_path, "evaluate.py", run / "checkpoints", "--task", "exact_match", "--data", run / "bad.json"
    )
    assert done.code != 0
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "sample 'sample-1': image" in done.stderr and "gone.png does not exist" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere", "--prompt", "?"], "error: no checkpoint at nowhere: nowhere is not a directory"),
        pytest.param(
            ["RUN", "--prompt", "?", "--media", "gone.png"],
            "error: prompt 1: image 'gone.png' does not exist",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_costs_one_line(run, arguments, expected):
    checkpoint = str(run / "checkpoints")
    done = warm_tool("generate.py", *[checkpoint if argument == "RUN" else argument for argument in arguments])
    assert done.code != 0 and done.stdout == ""
    assert done.stderr.startswith(expected) and done.stderr.count("\n") == 1, done.stderr


def test_bad_arguments_cost_one_line_on_several_ranks(tmp_path):
    done = tool_on_ranks(2, tmp_path, "train.py", "recipe.yaml", "--training.steps=3")
    assert done.code != 0 and done.stdout == ""
    assert done.stderr.startswith("error: unrecognized arguments: --training.steps=3"), done.stderr
    assert done.stderr.count("\n") == 1


def odd_conversations(folder: Path) -> Path:
    """JSONL as Windows writes it (byte order mark, CRLF), one id for all, and images of every mode."""
    images = {
        "alpha.png": Image.new("RGBA", (30, 20)),
        "palette.gif": Image.new("P", (28, 28), 3),
        "print.jpg": Image.new("CMYK", (20, 30)),
        "scan.png": Image.fromarray(np.full((28, 28), 40_000, np.uint16)),
        "fax.png": Image.new("1", (28, 28)),
    }
    (folder / "images").mkdir()
    turns = [{"from": "human", "value": "Was ist dás? ☃"}, {"from": "gpt", "value": "漢字 😀"}]
    records: list[dict[str, object]] = [{"conversations": turns}]
    for name, image in images.items():
        image.save(folder / "images" / name)
        records.append({"id": "same", "image": name, "conversations": turns})
    text = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (folder / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    return folder / "odd.jsonl"


@pytest.mark.slow
def test_a_users_own_data_and_every_key_the_other_tests_leave_alone(run, tmp_path):
    done = tool(
        "train.py", run / "recipe.yaml", f"checkpoint.directory={tmp_path}/own", "checkpoint.every_steps=2",
        "training.steps=3", "training.media_window=4", f"data.path={odd_conversations(tmp_path)}",
        f"data.media_root={tmp_path}/images", "data.num_workers=2", "data.image_mode=resize", "data.shuffle=false",
        "precision.params=bf16", "precision.grad_reduce=bf16", "optimizer.clip_norm=0", "ops.loss_chunk_tokens=7",
        "logging.progress=true", "logging.every_steps=3", "logging.curves=true",
    )  # fmt: skip
    assert done.code == 0 and done.stderr == "", done.stderr
    assert "training 3/3" in done.stdout and "training 1/3" not in done.stdout
    assert {"step_0000002", "step_0000003", "curves.png"} <= {path.name for path in (tmp_path / "own").iterdir()}
    losses = [json.loads(line)["loss"] for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(4 < loss < 8 for loss in losses)
