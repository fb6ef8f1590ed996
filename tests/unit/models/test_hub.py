"""Hub ids: their form, the commit they stand for, and what is said where there is none. The cache is huggingface's own
layout, read by its own code without a network."""

from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.models import hub
from megatron_vlm.models.hf_config import config_from_path
from tests.helpers.hub_cache import A, B, HubCache
from tests.helpers.models.tiny import tiny_tokenizer

HEADS = '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": %d}'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """`somebody/model`: main and v1 are A, dev is B."""
    cache = HubCache(tmp_path / "cache", monkeypatch)
    for commit, heads in ((A, 4), (B, 8)):
        (cache.snapshot("somebody/model", commit) / "config.json").write_text(HEADS % heads)
    for name, commit in {"main": A, "v1": A, "dev": B, "refs/pr/3": B}.items():
        cache.point("somebody/model", name, commit)
    return cache


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("org/name", ("org/name", None)),
        ("name", ("name", None)),
        ("org/name@main", ("org/name", "main")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        (f"org/name@{A}", ("org/name", A)),
        ("org/name@", None),
        ("org/name@../../etc", None),
        ("org/name@a b", None),
        ("org/name@/etc", None),
        ("org/name@main@x", None),
        ("a/b/c@main", None),
        ("/a@main", None),
        ("./a@main", None),
        ("~/a@main", None),
        ("../a", None),
        ("a\0b", None),
        ("", None),
    ],
)
def test_the_form_of_an_id(path: str, found: tuple[str, str | None] | None) -> None:
    assert hub.parse(path) == found


def test_a_directory_counts_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name@main").mkdir(parents=True)
    assert hub.parse("org/name@main") is None and hub.fetched("org/name@main", ["*"]) == Path("org/name@main")
    assert hub.pinned("org/name@main") == "org/name@main" and hub.commits({"org/name@main": Path("x")}) == {}


def test_a_branch_or_tag_is_a_commit(cache: HubCache) -> None:
    for named, commit in {"": A, "@main": A, "@v1": A, "@dev": B, "@refs/pr/3": B, f"@{B}": B}.items():
        path = f"somebody/model{named}"
        assert hub.pinned(path) == f"somebody/model@{commit}"
        folder = hub.fetched(path, hub.CONFIG_FILES)
        assert hub.commits({path: folder}) == {path: commit}
        config = config_from_path("model.language.path", path)
        assert config.num_attention_heads == {A: 4, B: 8}[commit] and config.name_or_path == path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("somebody/model@v9", "no revision 'v9' of somebody/model is cached completely, and the hub cannot be reached"),
        (f"somebody/model@{'c' * 40}", "no revision 'c+' of somebody/model is cached completely"),
        ("nobody/model", "no revision of nobody/model is cached completely, and the hub cannot be reached"),
        ("some--body/model", "Repo id|Cannot have -- or"),
    ],
)
def test_what_is_neither_cached_nor_asked_for_is_told(cache: HubCache, path: str, message: str) -> None:
    with pytest.raises(hub.HubError, match=message) as caught:
        hub.fetched(path, hub.CONFIG_FILES)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"^model.vision.path: '{path}' cannot be fetched: "):
        config_from_path("model.vision.path", path)


def test_a_revision_that_the_hub_has_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, message in (
        (RevisionNotFoundError, "org/name has no revision 'v9' (a branch, tag or commit)"),
        (RepositoryNotFoundError, "the hub has no org/name, or you have no access to it"),
    ):

        def refuse(*_: object, kind: type = kind, **__: object) -> str:
            raise kind("404 Client Error. (Request ID: x)\n\nNot found for url.", response=Mock(headers={}))

        monkeypatch.setattr(hub, "snapshot_download", refuse)
        with pytest.raises(hub.HubError) as caught:
            hub.fetched("org/name@v9", ["*"])
        assert str(caught.value) == message


def test_a_tokenizer_is_taken_at_its_revision(cache: HubCache, tmp_path: Path) -> None:
    """Asked for by its own key, and fetched with its own files."""
    for file in tiny_tokenizer(tmp_path).iterdir():
        (cache.snapshot("somebody/model", B) / file.name).write_bytes(file.read_bytes())
    assert load_tokenizer("somebody/model@dev", "<image>").name_or_path == "somebody/model@dev"
    with pytest.raises(ConfigError, match="no tokenizer can be loaded from 'somebody/model@v1': it holds none of"):
        load_tokenizer("somebody/model@v1", "<image>")
