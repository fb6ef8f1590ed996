"""The README's three commands from weights to answers, as they stand there: on a twin of the recipe, small everywhere
but in its vocabulary, whose rows must be those of the published weights.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.helpers.models.verify_models import WIDTH, Shape, draw, save_llava_hf
from tests.helpers.ranks.processes import ROOT, environment, programs

README = (ROOT / "README.md").read_text()
PUBLISHED_ROWS = 32064
TWIN = {
    "runtime": {"device": "cpu"},
    "model": {
        "language": {
            "tokenizer": "llava-1.5-7b-hf",
            "config": {
                "hidden_size": WIDTH,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        },
        "vision": {
            "config": {
                "hidden_size": WIDTH,
                "intermediate_size": 40,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "image_size": 12,
                "patch_size": 4,
            },
        },
    },
    "parallel": {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "sequence": False},
    "data": {"num_workers": 0},
    "training": {"sequence_length": 256, "global_batch_size": 1, "micro_batch_size": 1},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_three_commands(tmp_path: Path) -> None:
    record = re.search(r"^    (\{\"id\".*\n.*\})$", README, re.MULTILINE)
    block = re.search(r"three commands[^:]*:\n\n((?:    .*\n)+)", README)
    assert record and block
    lines = [line.strip() for line in block[1].splitlines()]
    recipe = re.search(r"examples/recipes/\S+", lines[1])
    assert recipe and len(lines) == 3
    (tmp_path / "mine.json").write_text(f"[{record[1]}]")
    Image.new("RGB", (20, 16), (200, 10, 10)).save(tmp_path / "cat.jpg")
    (tmp_path / "twin.yaml").write_text(yaml.safe_dump({"base": str(ROOT / recipe[0]), **TWIN}))
    save_llava_hf(draw(Shape(text={"vocab_size": PUBLISHED_ROWS, "rms_norm_eps": 1e-5})), tmp_path / "llava-1.5-7b-hf")
    surroundings = environment(PATH=programs(tmp_path / "bin"))
    for line in lines:
        line = line.replace(recipe[0], "twin.yaml").replace("training.steps=500", "training.steps=1")
        line = line.replace("NPROC_PER_NODE=8 examples", f"env NPROC_PER_NODE=1 bash {ROOT}/examples")
        done = subprocess.run(
            shlex.split(line), cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0 and done.stderr == "", f"{line}\n{done.stderr}"
    assert done.stdout.count("\n") == 1, done.stdout  # an answer; rows beyond the tokenizer's tokens have no text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_your_own_data_from_nothing(tmp_path: Path) -> None:
    """A step's worth of records, and one pass over them instead of ten."""
    block = re.search(r"not yet run there\):\n\n((?:    .*\n)+)", README)
    assert block
    lines = [line.strip() for line in block[1].splitlines()]
    assert [line.split()[1] for line in lines] == ["data", "train", "generate"]
    Image.new("RGB", (20, 16), (200, 10, 10)).save(tmp_path / "cat.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]
    records = [{"id": str(number), "image": "cat.jpg", "conversations": turns} for number in range(40)]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    surroundings = environment(PATH=programs(tmp_path / "bin"))
    for line in lines:
        line = line.replace("training.epochs=10", "training.epochs=1 runtime.device=cpu")
        done = subprocess.run(
            shlex.split(line), cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0 and done.stderr == "", f"{line}\n{done.stderr}"
    assert (tmp_path / "runs" / "mine" / "step_0000001").is_dir()
    assert done.stdout.count("\n") == 1, done.stdout
