"""Recipes: bases, overrides, errors on one line, and the way back to YAML."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config import config_hash, load_config, to_yaml
from megatron_vlm.errors import ConfigError, RecipeError
from tests.unit.config.recipes import error_of, recipe, tree, write


def test_reads_what_was_written(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "r.yaml", tree(optimizer__betas=[0.8, 0.9])))
    assert config == recipe(optimizer__betas=[0.8, 0.9])
    assert config.optimizer.betas == (0.8, 0.9)


def test_bases_chain_and_are_relative_to_their_file(tmp_path: Path) -> None:
    write(tmp_path / "base" / "first.yaml", tree(training__steps=1, optimizer__lr=0.5, model__freeze=["a", "b"]))
    write(tmp_path / "base" / "second.yaml", {"base": "first.yaml", "training": {"steps": 2}})
    child = {"base": "base/second.yaml", "model": {"language": {"path": "weights", "config": None}, "freeze": ["c"]}}
    config = load_config(write(tmp_path / "child.yaml", child))
    assert (config.training.steps, config.training.sequence_length, config.optimizer.lr) == (2, 128, 0.5)
    assert (config.model.language.path, config.model.language.config) == ("weights", None)
    assert config.model.freeze == ("c",)


MINE = {"path": "mine.json"}


@pytest.mark.parametrize("section", ["data", "evaluation"])
@pytest.mark.parametrize(
    ("children", "overrides", "root"),
    [
        ([{}], [], "theirs"),
        ([MINE], [], None),
        ([MINE | {"media_root": "ours"}], [], "ours"),
        ([{}], ["path=mine.json"], None),
        ([{}], ["path=mine.json", "media_root=ours"], "ours"),
        ([{}], ["media_root=ours", "path=mine.json"], "ours"),
        ([{"path": "train.json"}], ["path=train.json"], "theirs"),  # the same file as before
        ([MINE, {}], ["media_root=ours"], "ours"),
        ([{"media_root": "ours"}, MINE], [], None),  # a folder in between is of the file in between
        ([MINE | {"media_root": "ours"}, {}], [], "ours"),
    ],
)
def test_a_folder_of_images_goes_with_its_file(
    tmp_path: Path, section: str, children: list[dict[str, Any]], overrides: list[str], root: str | None
) -> None:
    """A base's does not send the images of a file that the child, or the command line, names elsewhere."""
    keys = {f"{section}__path": "train.json", f"{section}__media_root": "theirs"}
    path = write(tmp_path / "r.yaml", tree(**keys))
    for number, child in enumerate(children):
        path = write(tmp_path / f"{number}.yaml", {"base": path.name, section: child} if child else {"base": path.name})
    config = load_config(path, [f"{section}.{override}" for override in overrides])
    assert getattr(config, section).media_root == root


def test_a_folder_of_images_without_a_file_is_for_any(tmp_path: Path) -> None:
    """A cluster's, say."""
    write(tmp_path / "cluster.yaml", {"data": {"media_root": "/images"}})
    mine = {section: keys for section, keys in tree().items() if section != "data"}
    path = write(tmp_path / "mine.yaml", {**mine, "base": "cluster.yaml", "data": {"path": "mine.json"}})
    assert load_config(path).data.media_root == "/images"
    path = write(tmp_path / "no_data.yaml", {**mine, "base": "cluster.yaml"})
    assert load_config(path, ["data.path=mine.json"]).data.media_root == "/images"


def test_a_folder_of_images_that_is_left_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("megatron_vlm.config.loading.logger.info", lambda text, *parts: said.append(text % parts))
    path = write(tmp_path / "r.yaml", tree(data__media_root="theirs"))
    load_config(path, ["data.path=mine.json"])
    load_config(path, ["data.path=train.json"])
    assert len(said) == 1 and "data.media_root theirs is ignored" in said[0] and "mine.json" in said[0]


def test_overrides_come_last_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", tree(training__media_window=4))
    config = load_config(
        path,
        [
            "training.steps=7",
            "training.steps=8",
            "optimizer.lr=1e-5",
            "training.media_window=null",
            "model.freeze=[^vision,bias]",
            "model.language.config.hidden_size=32",
            "data.path=a=b.json",
        ],
    )
    assert (config.training.steps, config.optimizer.lr, config.training.media_window) == (8, 1e-5, None)
    assert config.model.freeze == ("^vision", "bias")
    assert config.model.language.config == {"model_type": "llama", "hidden_size": 32}
    assert config.data.path == "a=b.json"


@pytest.mark.parametrize(
    ("child", "overrides", "length"),
    [
        ({"epochs": 2}, [], (None, 2.0)),
        ({}, ["training.epochs=0.5"], (None, 0.5)),
        ({"epochs": 2}, ["training.steps=3"], (3, None)),
        ({"epochs": 2}, ["training.epochs=3"], (None, 3.0)),
        ({"epochs": None}, ["training.sequence_length=64"], (10, None)),
        ({"epochs": 2, "steps": None}, [], (None, 2.0)),
    ],
)
def test_epochs_take_the_place_of_steps_and_steps_of_epochs(
    tmp_path: Path, child: dict[str, Any], overrides: list[str], length: tuple[int | None, float | None]
) -> None:
    write(tmp_path / "base.yaml", tree())
    path = write(tmp_path / "child.yaml", {"base": "base.yaml", "training": child})
    training = load_config(path, overrides).training
    assert (training.steps, training.epochs) == length


@pytest.mark.parametrize(
    ("length", "overrides", "expected"),
    [
        ({"steps": 10, "epochs": 2}, [], "training: found both steps 10 and epochs 2.0, needs exactly one of them ("),
        ({"steps": None}, [], "training: found neither steps nor epochs, needs exactly one of them"),
        ({}, ["training.steps=1", "training.epochs=1"], "training: found both steps 1 and epochs 1.0, needs exactly"),
        ({}, ["training.epochs=0"], "training.epochs: found 0, must be greater than 0"),
        ({}, ["training.epochs=.inf"], "training.epochs: found inf, must be a finite number"),
        ({}, ["training.epochs=true"], "training.epochs: found True, a number is needed"),
    ],
)
def test_steps_and_epochs_are_not_given_together(
    tmp_path: Path, length: dict[str, Any], overrides: list[str], expected: str
) -> None:
    recipe_tree = tree()
    recipe_tree["training"] |= length
    path = write(tmp_path / "r.yaml", recipe_tree)
    message = error_of(path, *overrides)
    assert expected in message and message.count("; ") == 0
    message = error_of(path, *overrides, "training.sequence_length=1", "optimizer.lr=-1")  # with all other faults
    assert expected in message and message.count("; ") == 2


def test_a_reference_to_steps_is_told_where_the_child_has_epochs(tmp_path: Path) -> None:
    """Also a reference to what nobody sets; each names the key that refers."""
    write(tmp_path / "base.yaml", tree(checkpoint__every_steps="${training.steps}"))
    child = {"base": "base.yaml", "training": {"epochs": 2}}
    assert error_of(write(tmp_path / "child.yaml", child)).endswith(
        "child.yaml: checkpoint.every_steps: refers to training.steps, in whose place the recipe has training.epochs; "
        "needs a value of its own"
    )
    assert error_of(tmp_path / "base.yaml", "logging.every_steps=${logging.curve}").endswith(
        "logging.every_steps: refers to logging.curve, which the recipe does not set, needs a key that it or "
        "a base sets"
    )
    assert load_config(tmp_path / "base.yaml").checkpoint.every_steps == 10


def test_keys_may_refer_to_keys_but_not_to_the_environment(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", tree(checkpoint__load="${ checkpoint.directory }/first"))
    assert load_config(path).checkpoint.load == load_config(path).checkpoint.directory + "/first"
    path = write(tmp_path / "r.yaml", tree(checkpoint__load="${checkpoint.directory}/first"))
    assert load_config(path).checkpoint.load == "runs/test/first"
    assert "own keys only" in error_of(path, "data.path=${oc.env:HOME}")
    told = "data.path: refers to checkpoint.nowhere, which the recipe does not set"
    assert told in error_of(path, "data.path=${checkpoint.nowhere}")


def test_all_violations_on_one_line_with_near_names(tmp_path: Path) -> None:
    broken = tree(training__steps=0, parallel__tensr=2, precision__params="fp17", tensor=2, zebra=1)
    del broken["checkpoint"]
    message = error_of(write(tmp_path / "r.yaml", broken))
    for part in (
        "training.steps: found 0, must be greater than 0",
        "parallel.tensr: unknown key, did you mean 'tensor'?",
        "precision.params: found 'fp17', must be 'fp32' or 'bf16'",
        "tensor: unknown key, did you mean 'parallel.tensor'?",
        "zebra: unknown key, allowed: runtime, model,",
        "checkpoint: missing, needs a value",
    ):
        assert part in message
    assert message.count("; ") == 5


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- a\n- b\n", "needs a mapping of sections"),
        ("a: [1,\n", "not valid YAML: line 2, column 1: "),
        ("a: 1\na: 2\n", "not valid YAML: line 2, column 1: found duplicate key a"),
        ("a:\n\tb: 1\n", "start any token; there is a tab, YAML is indented by blanks"),
        ("a:\n  b: 1\n c: 2\n", "not valid YAML: line 3, column 2: "),
        ("base: 3\n", "base: found 3, needs the path of one recipe"),
        ("base: gone.yaml\n", "gone.yaml (base of "),
        ("", "model: missing, needs a value"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path / "r.yaml", content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in error_of(tmp_path / "gone.yaml")
    assert "cannot be read: is a directory, a regular file is needed" in error_of(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00a")
    error_of(binary)


def test_bases_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"base": "b.yaml"})
    write(tmp_path / "b.yaml", {"base": "a.yaml"})
    with pytest.raises(ConfigError, match=r"base: found a circle \(a.yaml -> b.yaml -> a.yaml\)"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("override", ["training.steps", "=3", "--debug"])
def test_overrides_of_another_form(tmp_path: Path, override: str) -> None:
    message = error_of(write(tmp_path / "r.yaml", tree()), override)
    assert f"override {override!r}: needs the form section.key=value" in message


def test_an_override_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    message = error_of(write(tmp_path / "r.yaml", tree()), "training.steps=3", "optimizer.betas=[0.9")
    assert message.startswith("override 'optimizer.betas=[0.9': the value is not valid YAML")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=fast", "optimizer.lr: found 'fast', must be a valid number"),
        ("optimizer=null", "optimizer: found None, must be a section of keys"),
        ("model.freeze=language", "model.freeze: found 'language', must be a list"),
        ("model.language.config=llama", "model.language.config: found 'llama', must be keys with values"),
        ("optimizer.lr=.inf", "optimizer.lr: found inf, must be a finite number"),
        ("optimizer.eps=.nan", "optimizer.eps: found nan, "),
        ("training.steps=true", "training.steps: found True, a number is needed"),
        ("optimizer.lr=false", "optimizer.lr: found False, a number is needed"),
        ("loss.label_smoothing=1.0", "loss.label_smoothing: found 1.0, "),
        ("loss.z_loss=-1e-4", "loss.z_loss: found -0.0001, "),
        ("loss.time_tokens={count: 0}", "loss.time_tokens.count: found 0, "),
        ("loss.time_tokens={count: 9, std: 0.0}", "loss.time_tokens.std: found 0.0, "),
        ("loss.time_tokens={count: 9, format: <t>}", "loss.time_tokens.format: found '<t>', must have {t} where"),
        ("model.vision.select_layer=false", "model.vision.select_layer: found False, a number is needed"),
    ],
)
def test_a_value_of_another_kind(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path / "r.yaml", tree()), override)


def test_yaml_and_hash_round_trip(tmp_path: Path) -> None:
    config = recipe(optimizer__eps=1e-9, model__freeze=["^vision", "a: b"], training__media_window=2)
    again = load_config(write(tmp_path / "r.yaml", to_yaml(config)))
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert len(config_hash(config)) == 12
    assert config_hash(recipe(runtime__seed=43)) != config_hash(recipe())
    reordered = dict(reversed(tree().items()))
    assert config_hash(load_config(write(tmp_path / "s.yaml", reordered))) == config_hash(recipe())


@pytest.mark.parametrize("rate", ["2e-5", "2.0e-5", '"2e-5"', "0.00002"])
def test_a_learning_rate_as_people_write_it(tmp_path: Path, rate: str) -> None:
    """YAML 1.1, which PyYAML reads, takes 2e-5 for a text."""
    text = to_yaml(recipe()).replace("lr: 2.0e-05", f"lr: {rate}")
    assert f"lr: {rate}\n" in text
    assert load_config(write(tmp_path / "r.yaml", text)).optimizer.lr == 2e-5
    assert load_config(write(tmp_path / "s.yaml", tree()), [f"optimizer.lr={rate}"]).optimizer.lr == 2e-5


def test_faults_of_keys_are_told_one_by_one(tmp_path: Path) -> None:
    faulty = tree(optimizer__lrr=1, training__media_window="many", optimizer__betas=[0.9, "x"], model__freeze=[3])
    path = write(tmp_path / "r.yaml", faulty)
    with pytest.raises(RecipeError) as caught:
        load_config(path, ["logging.every=2", "training.micro_batch_size=1"])
    keys = "model.freeze.0", "optimizer.betas.1", "optimizer.lrr", "training.media_window", "logging.every"
    assert [fault.removeprefix(f"{path}: ").split(":")[0] for fault in caught.value.faults] == list(keys)
