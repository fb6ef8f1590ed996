"""The extensions that a checkpoint names run at the user's word only, and whatever one does at import is one line."""

import hashlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vlm.checkpoint.manifest import ALWAYS_THERE, FileRecord, Manifest
from megatron_vlm.checkpoint.recipe import PARTS, inference_config, saved_config
from megatron_vlm.checkpoint.resume import Start
from megatron_vlm.config import extensions as config_extensions
from megatron_vlm.config.extensions import import_extensions
from megatron_vlm.config.loading import hash_of_tree
from megatron_vlm.config.schema import Config, ParallelConfig
from megatron_vlm.errors import ConfigError
from tests.helpers.ranks.solo import small_recipe
from tests.helpers.ranks.tool_runs import tool, warm_tool

NAMES = ("own_of_a_stranger", "second_of_a_stranger")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory holds modules that tell that they ran; path and modules are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / f'{name}_ran')!r})\n")
    yield tmp_path
    for name in (*NAMES, "failing_of_a_stranger"):
        sys.modules.pop(name, None)


def a_checkpoint(folder: Path, *extensions: str) -> tuple[Path, Manifest]:
    """Nothing but a manifest and the directories that are looked for."""
    tree = small_recipe().model_dump(mode="json") | {"extensions": list(extensions)}
    files = dict.fromkeys(ALWAYS_THERE, FileRecord(0, hashlib.sha256().hexdigest()))
    manifest = Manifest(1, tree, hash_of_tree(tree), [], 61, {"tensor": 1}, None, files)
    for part in PARTS:
        (folder / part).mkdir(parents=True)
    manifest.write(folder)
    return folder, manifest


def test_a_checkpoint_imports_nothing(here: Path) -> None:
    path = list(sys.path)
    directory, manifest = a_checkpoint(here / "step_0000001", *NAMES)
    with pytest.raises(ConfigError) as caught:
        inference_config(directory, ParallelConfig())
    told = str(caught.value)
    assert all(f"--extensions {name} (in Python load(..., extensions=[...]))" in told for name in NAMES)
    assert told.startswith(f"{directory}/manifest.json: extensions.0: found '{NAMES[0]}', is code, which a checkpoint")
    assert not list(here.glob("*_ran")) and sys.path == path and "\n" not in told
    sys.path.append(str(here))  # as PYTHONPATH, or a package that is installed
    with pytest.raises(ConfigError, match="--extensions"):
        saved_config(directory, manifest)
    assert not list(here.glob("*_ran"))


def test_the_users_word_imports_and_says_so(here: Path) -> None:
    directory, manifest = a_checkpoint(here / "step_0000001", *NAMES)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    config_extensions.logger.addHandler(handler)
    try:
        import_extensions(NAMES[:1])
        with pytest.raises(ConfigError, match=f"found '{NAMES[1]}'") as caught:
            saved_config(directory, manifest)
        assert NAMES[0] not in str(caught.value)
        import_extensions(NAMES)
    finally:
        config_extensions.logger.removeHandler(handler)
    assert told == [f"extension {name}: {here / name}.py" for name in NAMES]
    assert saved_config(directory, manifest).extensions == NAMES
    assert len(list(here.glob("*_ran"))) == 2


def test_a_resume_imports_what_its_own_recipe_names_alone(here: Path) -> None:
    directory, manifest = a_checkpoint(here / "step_0000001", *NAMES)
    Start(directory, manifest, "all").check_recipe(Config.model_validate(manifest.config | {"extensions": []}))
    assert not list(here.glob("*_ran"))


def test_the_working_directory_is_looked_in_last_and_for_what_only_it_has(here: Path) -> None:
    (here / "json.py").write_text("raise SystemExit('the wrong one')")
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / f"{NAMES[0]}.py").write_text("")
    sys.path.append(str(here / "elsewhere"))
    import_extensions(["json.tool", NAMES[0]])
    assert str(here) not in sys.path and not list(here.glob("*_ran"))
    with pytest.raises(ConfigError, match="ModuleNotFoundError"):
        import_extensions(["no_module_of_anybody"])
    assert str(here) not in sys.path
    import_extensions(NAMES[1:])
    assert sys.path[-1] == str(here)


@pytest.mark.parametrize(
    "fault",
    [
        "raise SystemExit(False)",
        "raise SystemExit(0)",
        "class Own(BaseException): pass\nraise Own('of its own')",
        "raise GeneratorExit",
        "raise ValueError('two\\nlines \\x1b]0;x')",
        "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})",
        "def f(): f()\nf()",
        "import x of y",
        "import no_such_module_here",
    ],
)
def test_whatever_happens_at_import_is_one_line(here: Path, fault: str) -> None:
    (here / "failing_of_a_stranger.py").write_text(fault)
    with pytest.raises(ConfigError, match="found 'failing_of_a_stranger', must be a module that Python can") as caught:
        import_extensions(["failing_of_a_stranger"])
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"extensions\.0: found 'failing_of_a_stranger', must be a module"):
        small_recipe_from_a_file(here)


def small_recipe_from_a_file(folder: Path) -> None:
    from megatron_vlm.config import load_config, to_yaml

    (folder / "recipe.yaml").write_text(to_yaml(small_recipe()))
    load_config(folder / "recipe.yaml", ["extensions=[failing_of_a_stranger]"])


COMMANDS = {
    "generate": ["generate.py", "CHECKPOINT", "--prompt", "x"],
    "evaluate": ["evaluate.py", "CHECKPOINT", "--task", "exact_match", "--data", "none.json"],
    "export": ["convert.py", "export", "CHECKPOINT", "out"],
    "verify": ["convert.py", "verify", "CHECKPOINT", "CHECKPOINT"],
}


@pytest.mark.parametrize("name", ["generate", *(pytest.param(n, marks=pytest.mark.slow) for n in list(COMMANDS)[1:])])
def test_no_tool_imports_it(here: Path, name: str) -> None:
    """In a downloaded directory, whose modules lie beside the checkpoint."""
    directory, manifest = a_checkpoint(here / "step_0000001", NAMES[0], "unittest.__main__")
    for file in manifest.files:
        (directory / file).touch()
    done = tool(*[str(directory) if word == "CHECKPOINT" else word for word in COMMANDS[name]])
    assert done.code == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done
    assert f"--extensions {NAMES[0]}" in done.stderr and "--extensions unittest.__main__" in done.stderr
    assert not list(here.glob("*_ran"))


def test_the_option_takes_names_of_modules() -> None:
    done = warm_tool("generate.py", "anywhere", "--prompt", "x", "--extensions", "a.b,../c")
    assert done.code == 1 and "--extensions: found 'a.b,../c', needs names of modules" in done.stderr
