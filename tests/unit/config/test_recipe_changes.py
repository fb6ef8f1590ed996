"""What may change between the runs of one training, and how the rest is refused."""

import pytest

from megatron_vlm.config.recipe_changes import UNTRAINED, refuse_data_changes, refuse_recipe_changes
from megatron_vlm.config.rules.checkpoint import unknown_changes
from megatron_vlm.config.rules.gathered import MAY_CHANGE, may_change
from megatron_vlm.config.schema import Config
from megatron_vlm.config.schema.tree import keys_and_sections, leaves
from megatron_vlm.errors import ConfigError
from tests.helpers.models.tiny import merge
from tests.unit.config.recipes import recipe


def changed(**sections: object) -> Config:
    """The recipe with other values."""
    return Config.model_validate(merge(recipe().model_dump(mode="json"), sections))


def test_the_table_decides_on_every_key_and_names_no_other() -> None:
    keys = [key for key, _ in leaves(recipe().model_dump(mode="json"))]
    assert len(keys) > 60
    for key in keys:
        assert isinstance(may_change(key), bool)
    assert set(MAY_CHANGE) <= set(keys_and_sections())


def test_a_key_that_the_table_forgot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MAY_CHANGE, "schedule")
    with pytest.raises(AssertionError):
        may_change("schedule.warmup_ratio")


def test_what_cannot_change_the_result_may_change() -> None:
    now = changed(
        parallel={"tensor": 2, "sequence": True},
        runtime={"device": "cpu", "timeout_seconds": 5},
        data={"path": "elsewhere.json", "media_root": "there", "num_workers": 7},
        training={"micro_batch_size": 2, "media_window": 1, "media_batch": 1, "recompute": {"language": "full"}},
        checkpoint={"directory": "elsewhere", "every_steps": 9},
        logging={"every_steps": 3},
        ops={"loss_chunk_tokens": 64},
    )
    refuse_recipe_changes(recipe(), now, "step_1")


def test_every_change_of_meaning_is_named_with_both_values() -> None:
    now = changed(optimizer={"lr": 0.5, "betas": [0.5, 0.5]}, training={"steps": 3}, model={"freeze": ["x"]})
    with pytest.raises(ConfigError) as caught:
        refuse_recipe_changes(recipe(), now, "runs/a/step_1")
    message, before = str(caught.value), recipe()
    assert message.startswith("runs/a/step_1 was saved with another recipe: ")
    assert f"optimizer.lr: found 0.5, it was trained with {before.optimizer.lr}" in message
    assert f"training.steps: found 3, it was trained with {before.training.steps}" in message
    assert 'model.freeze: found ["x"], it was trained with []' in message
    accepted = "checkpoint.accept_changes=[model.freeze,optimizer.betas,optimizer.lr,training.steps]"
    assert accepted in message and "\n" not in message


def test_another_loss_is_noticed_whole() -> None:
    before = changed(loss={"time_tokens": {"count": 5}})
    now = changed(loss={"z_loss": 1e-4, "time_tokens": {"count": 5, "std": 2.0}})
    with pytest.raises(ConfigError, match=r"accept_changes=\[loss.time_tokens,loss.z_loss\]"):
        refuse_recipe_changes(before, now, "step_1")


@pytest.mark.parametrize(
    ("accepted", "refused"),
    [
        (["optimizer", "training.steps"], None),
        (["optimizer.lr", "optimizer.eps", "training"], None),
        (["optimizer.lr", "training.steps"], "optimizer.eps"),
        (["optimizer.l", "training", "optimizer.eps"], "optimizer.lr"),  # a key is accepted whole, not by its start
    ],
)
def test_changes_are_accepted_by_key_or_section(accepted: list[str], refused: str | None) -> None:
    now = changed(optimizer={"lr": 0.5, "eps": 0.5}, training={"steps": 3}, checkpoint={"accept_changes": accepted})
    if refused is None:
        refuse_recipe_changes(recipe(), now, "step_1")
    else:
        with pytest.raises(ConfigError, match=rf"accept_changes=\[{refused}\]"):
            refuse_recipe_changes(recipe(), now, "step_1")


def test_a_models_own_configuration_is_one_value() -> None:
    old = changed(model={"language": {"path": None, "config": {"model_type": "llama", "hidden_size": 8}}})
    new = changed(model={"language": {"path": None, "config": {"model_type": "llama", "hidden_size": 16}}})
    with pytest.raises(ConfigError, match=r"model.language.config: found .*16.*trained with .*8"):
        refuse_recipe_changes(old, new, "step_1")


def test_other_samples_are_refused_unless_accepted() -> None:
    saved = {"samples": 9, "tokens": 70, "ids": "aa", "contents": "bb"}
    found = {"samples": 9, "tokens": 71, "ids": "aa", "contents": "cc"}
    refuse_data_changes(saved, dict(saved), recipe(), "step_1")
    refuse_data_changes(None, found, recipe(), "step_1")
    with pytest.raises(ConfigError) as caught:
        refuse_data_changes(saved, found, recipe(), "step_1")
    assert str(caught.value).endswith(
        ", whose samples are not those of step_1: 71 tokens, it was trained on 70; the contents differ; needs the same "
        "samples, or checkpoint.accept_changes=[data] to go on with these"
    )
    refuse_data_changes(saved, found, changed(checkpoint={"accept_changes": ["data"]}), "step_1")


def test_answers_that_are_no_longer_trained_are_another_data() -> None:
    """Of which a run from before they could be told alone has no number; its samples are equal in all else."""
    saved: dict[str, int | str] = {"samples": 9, "contents": "bb"}
    found = {**saved, UNTRAINED: 2}
    for before, now, told in (
        (saved, found, "2 {}, it was trained with 0"),
        (found, saved, "0 {}, it was trained with 2"),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse_data_changes(before, now, recipe(), "step_1")
        assert f"are not those of step_1: {told.format(UNTRAINED)}; needs the same samples" in str(caught.value)
    refuse_data_changes(found, dict(found), recipe(), "step_1")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optimizer.lrr", "did you mean 'optimizer.lr'?"),
        ("warmup_ratio", "did you mean 'schedule.warmup_ratio'?"),
        ("optimizer.steps", "did you mean 'training.steps'?"),
        ("everything at once", "needs a key or section, such as 'optimizer.lr'"),
    ],
)
def test_an_accepted_change_that_is_no_key_is_refused(name: str, hint: str) -> None:
    (violation,) = unknown_changes(changed(checkpoint={"accept_changes": ["data", name]}))
    assert violation == f"checkpoint.accept_changes[1]: found {name!r}, which is not a key, {hint}"
