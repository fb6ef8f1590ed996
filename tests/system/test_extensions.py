"""The examples of extensions, through the recipe snippets in their own docstrings: each trains, by tools/train.py.

In processes of their own, since what an extension registers stays registered, and with nothing on PYTHONPATH: they are
found from the repository's root, as documented.
"""

import json
import multiprocessing
import re
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_vlm.config import to_yaml
from tests.helpers.models.tiny import merge, tiny_dataset, tiny_recipe
from tests.helpers.ranks.processes import ROOT, environment
from tests.helpers.ranks.tool_runs import Done, tool, tool_on_ranks, warm_tool

NAMES = ("own_tower", "own_language_model", "own_source")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tests.helpers.ranks.tool_runs.environment", partial(environment, PYTHONPATH=""))


def snippet(name: str) -> dict[str, Any]:
    """The recipe in an example's docstring: its lines indented by four."""
    docstring = (ROOT / "examples" / "extensions" / f"{name}.py").read_text().split('"""')[1]
    lines = [line for line in docstring.splitlines() if line.startswith("    ")]
    return yaml.safe_load(textwrap.dedent("\n".join(lines)))


def write_tsv(folder: Path) -> None:
    """The tiny data set's shape in the own source's format: with and without an image."""
    lines = [f"images/{i}-0.png\tWhich is near?\tred" if i % 4 in (1, 2, 3) else "\tHow many?\tno" for i in range(24)]
    (folder / "train.tsv").write_text("\n".join(lines) + "\n")


def write_recipe(folder: Path, *names: str) -> Path:
    """A tiny recipe with the named examples' snippets laid over it."""
    tree = yaml.safe_load(to_yaml(tiny_recipe(folder, training={"steps": 4})))
    extensions: list[str] = []
    for name in names:
        found = snippet(name)
        extensions += found["extensions"]
        tree = merge(tree, found)
    tree["extensions"] = extensions
    if "own_source" in names:
        write_tsv(folder)
        tree["data"] |= {"path": str(folder / tree["data"]["path"]), "media_root": str(folder)}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def losses(folder: Path, done: Done) -> list[float]:
    assert done.code == 0 and done.stderr == "", done.stderr
    lines = (folder / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_all_three_train_in_one_process_and_answer(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, *NAMES)
    found = losses(tmp_path, tool("train.py", recipe))
    assert len(found) == 4 and found[-1] < found[0] - 0.1, found
    image = tmp_path / "images" / "1-0.png"
    ask = ["generate.py", tmp_path / "checkpoints", "--media", image, "--prompt", "Far?", "--max-new-tokens", 2]
    done = tool(*ask)
    assert done.code == 1 and done.stderr.count("\n") == 1, done.stderr
    assert all(f"--extensions examples.extensions.{name}" in done.stderr for name in NAMES)
    ask += ["--extensions", ",".join(f"examples.extensions.{name}" for name in NAMES)]
    alone = tool(*ask)
    over_two = tool(*ask, "--devices", "cpu", "cpu")
    evaluate = ["evaluate.py", tmp_path / "checkpoints", "--task", "exact_match", "--max-new-tokens", 2, *ask[-2:]]
    scored = tool(*evaluate, "--data", tiny_dataset(tmp_path, 3, "asked.json"))
    for done in (alone, over_two, scored):  # whose code is run is told, in a line each, before the answer
        assert done.code == 0 and done.stderr == "", done
        assert re.findall(r"extension (\S+):", done.stdout) == [f"examples.extensions.{name}" for name in NAMES]
    assert alone.stdout.count("\n") == 1 + len(NAMES)
    assert alone.stdout.splitlines()[-1] == over_two.stdout.splitlines()[-1]
    assert re.fullmatch(r"exact_match: [\d.]+% of 3 questions", scored.stdout.splitlines()[-1])


@pytest.mark.slow
def test_they_train_the_same_in_any_layout(tmp_path: Path) -> None:
    layouts = {"one": [], "four": ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]}
    found = {}
    for layout, overrides in layouts.items():
        folder = tmp_path / layout
        recipe = write_recipe(folder, *NAMES)
        options = [*overrides, "data.num_workers=1", "optimizer.eps=1e-6"]
        ranks = 4 if overrides else 1
        found[layout] = losses(folder, tool_on_ranks(ranks, folder / "logs", "train.py", recipe, *options))
    assert len(found["one"]) == 4 and found["one"][-1] < found["one"][0] - 0.1
    assert found["four"] == pytest.approx(found["one"], rel=1e-5)


@pytest.mark.slow
def test_check_layout_knows_extensions(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, *NAMES)
    done = tool_on_ranks(2, tmp_path / "logs", "train.py", recipe, "parallel.tensor=2", "--check-layout")
    assert done.code == 0, done.stderr


@pytest.mark.slow
def test_the_own_language_model_computes_what_transformers_does() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        right, without_norms = pool.apply(logit_differences)
    assert right < 1e-4 and without_norms > 0.1


def logit_differences() -> tuple[float, float]:
    """Largest difference of a logit over the logits' standard deviation, of Qwen3 with random weights; and the same
    where ours has every norm of queries and keys at one."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megatron_vlm.conversion.mappings import canonical_name
    from megatron_vlm.conversion.weights.loading import fill_language
    from megatron_vlm.conversion.weights.sources import StateSource
    from megatron_vlm.models.description import describe_model
    from megatron_vlm.models.families import build_model
    from tests.helpers.ranks.solo import one_rank, small_recipe

    sizes = snippet("own_language_model")["model"]["language"]["config"] | {"vocab_size": 61}
    extensions = {"extensions": ["examples.extensions.own_language_model"]}
    recipe = small_recipe(sections=extensions)
    recipe = small_recipe(sections={"model": recipe.model.model_dump() | {"language": {"config": sizes}}, **extensions})
    torch.manual_seed(5)
    reference = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in sizes.items() if k != "model_type"})).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    ids = torch.randint(61, (2, 17))
    positions = torch.arange(17).expand(2, 17)
    differences = []
    with one_rank() as grid:
        language = build_model(recipe, describe_model(recipe.model), grid).train(False).language
        fill_language(language, StateSource("state", reference.state_dict(), canonical_name), grid)
        expected = reference(ids).logits.detach()
        for _ in range(2):
            differences.append(float((language[0](ids, positions) - expected).abs().max() / expected.std()))
            for name, parameter in language[0].named_parameters():
                if "q_layernorm" in name or "k_layernorm" in name:
                    parameter.data.fill_(1.0)
    return differences[0], differences[1]


@pytest.mark.parametrize("module", ["examples.extensions.own_towr", "no_package"])
def test_an_extension_that_cannot_be_imported_costs_one_line(module: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "own_source")
    done = warm_tool("train.py", recipe, f"extensions=[{module}]")
    assert done.code == 1 and done.stderr.count("\n") == 1
    assert f"extensions.0: found '{module}', must be a module that Python can import" in done.stderr


def test_an_unknown_source_names_the_near_one(tmp_path: Path) -> None:
    done = warm_tool("train.py", write_recipe(tmp_path, "own_source"), "data.source=tvs")
    assert done.code == 1 and done.stderr == "error: unknown data source 'tvs'; did you mean 'tsv'?\n"
