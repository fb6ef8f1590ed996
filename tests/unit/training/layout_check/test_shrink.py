"""The shrunk recipe: as small as may be, the same in all that a layout depends on."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, Qwen2Config

from megatron_vlm.config.rules import validate
from megatron_vlm.config.schema import Config, PrecisionConfig
from megatron_vlm.data.media.images import MediaReader
from megatron_vlm.data.media.store import MediaStore
from megatron_vlm.data.media.video.files import read_images
from megatron_vlm.data.sample import IGNORE
from megatron_vlm.data.sources.llava_json import LlavaJson
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.templates import TEMPLATES
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import DataError
from megatron_vlm.evaluation.tasks import TASKS
from megatron_vlm.models.architectures import attention_windows, load_language_config
from megatron_vlm.models.description import describe_model
from megatron_vlm.models.facts import gather_facts
from megatron_vlm.models.vision.survey import survey_tower
from megatron_vlm.parallel.layout import SequenceLayout, padded_length
from megatron_vlm.parallel.sizes import GridSizes
from megatron_vlm.training.layout_check.shrink import NUM_STEPS, pick_samples, shrink, shrink_batch
from tests.helpers.models.public_models import CLIP_L_336, QWEN2_7B
from tests.helpers.models.tiny import tiny_dataset, tiny_recipe, tiny_tokenizer


def large_recipe(directory: Path, **sections: Any) -> Config:
    """LLaVA on Qwen2-7B, of directories that hold configurations and a tokenizer, but no weights."""
    language, vision = tiny_tokenizer(directory), directory / "clip"
    Qwen2Config(**QWEN2_7B).save_pretrained(language)
    CLIPConfig(vision_config=CLIP_L_336).save_pretrained(vision)
    tree = {
        "model": {"language": {"path": str(language)}, "vision": {"path": str(vision)}},
        "data": {"path": str(tiny_dataset(directory)), "image_mode": "processor", "group_by_modality_length": True},
        "optimizer": {"lr_projector": 2e-5},
        "training": {
            "steps": 5197,
            "global_batch_size": 128,
            "micro_batch_size": 4,
            "media_window": 4,
            "media_batch": 64,
        },
        "checkpoint": {"directory": str(directory / "run"), "load": str(directory / "other")},
    }
    return Config.model_validate(tree | sections)


def shrunk(recipe: Config, world_size: int) -> tuple[Config, list[dict[str, Any]]]:
    return shrink(recipe, world_size, describe_model(recipe.model))


def test_epochs_are_not_counted_for_a_check(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, training={"steps": None, "epochs": 3.0})
    small, _ = shrunk(recipe, 2)
    assert (small.training.steps, small.training.epochs) == (NUM_STEPS, None)


def test_a_large_recipe_without_weights(tmp_path: Path) -> None:
    parallel = {"tensor": 4, "pipeline": 2, "virtual_pipeline": 2, "sequence": True, "overlap_grad_reduce": True}
    recipe = large_recipe(tmp_path, parallel=parallel)
    small, samples = shrunk(recipe, 8)
    validate(small, gather_facts(small, TEMPLATES.names(), TASKS.names()), 8)
    language = small.model.language.config
    assert language is not None and small.model.language.path is None
    kept = ("model_type", "vocab_size", "num_attention_heads", "num_key_value_heads")
    assert [language[key] for key in kept] == ["qwen2", 152064, 28, 4]
    assert (language["num_hidden_layers"], language["hidden_size"], language["head_dim"]) == (8, 56, 16)
    survey = survey_tower(small.model.vision, None)
    assert (survey.num_layers, survey.selected, survey.media_spec.tokens_per_image) == (
        3,
        2,
        36,
    )  # one left out, as before
    assert small.parallel == recipe.parallel and small.training.media_batch == 1
    assert small.precision.params == "fp32" and small.checkpoint.load is None
    assert (small.optimizer.lr, small.optimizer.lr_projector, small.optimizer.lr_vision) == (1e-3, 3e-3, None)
    assert len(samples) == 24  # all there are


@pytest.mark.parametrize("precision", [{"fp8": "tensorwise"}, {"fp8": "blockwise", "fp8_gradients": "e5m2"}])
def test_fp8_and_the_layers_left_out_of_it_stay_behind(tmp_path: Path, precision: dict[str, Any]) -> None:
    """One at each end would be all there are."""
    precision = {**precision, "fp8_exclude": {"first": 1, "last": 1}}
    small, _ = shrunk(large_recipe(tmp_path, precision=precision), 1)
    assert small.precision == PrecisionConfig(params="fp32", grad_reduce="fp32")
    validate(small, gather_facts(small, TEMPLATES.names(), TASKS.names()), 1)


def test_a_small_recipe_keeps_its_sizes(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, parallel={"tensor": 2})
    small, samples = shrunk(recipe, 2)
    before, after = recipe.model.language.config, small.model.language.config
    assert before is not None and after is not None
    assert [after[k] for k in before if k != "num_hidden_layers"] == [
        before[k] for k in before if k != "num_hidden_layers"
    ]
    assert after["num_hidden_layers"] == 2
    assert [len(sample.get("image") or ()) > 0 for sample in samples[:3]] == [True, True, False]


WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral"},
    "mixed": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 7},
    "phi3": {"model_type": "phi3", "pad_token_id": None},
}


@pytest.mark.parametrize("kind", WINDOWED)
def test_sliding_windows_stay_and_are_short(tmp_path: Path, kind: str) -> None:
    """Of both kinds of layers, where there are two, each of the four chunks has one, and no two in the same order as
    the chunk a stage has beside it."""
    own = {"sliding_window": 4096, "num_hidden_layers": 8} | WINDOWED[kind]
    recipe = tiny_recipe(tmp_path, parallel={"pipeline": 2, "virtual_pipeline": 2})
    assert recipe.model.language.config is not None
    language = recipe.model.language.model_copy(update={"config": recipe.model.language.config | own})
    small, _ = shrunk(recipe.model_copy(update={"model": recipe.model.model_copy(update={"language": language})}), 2)
    windows = attention_windows(load_language_config(small.model.language))
    assert {window for window in windows if window is not None} == {5} and small.training.sequence_length > 10
    chunks = [windows[start : start + 2] for start in range(0, 8, 2)]
    if kind == "mixed":
        assert all(set(chunk) == {5, None} for chunk in chunks)
        assert chunks[0] != chunks[2] and chunks[1] != chunks[3] and chunks[0] != chunks[1]
    else:
        assert windows == (5,) * 8


@pytest.mark.parametrize(
    ("batch", "sizes", "small"),
    [  # global batch, micro-batch, window; of ranks; the same of the small recipe
        ((128, 1, None), {}, (4, 1, None)),
        ((128, 4, None), {"data": 2}, (8, 2, None)),
        ((2, 1, None), {}, (2, 1, None)),  # no more micro-batches than there were
        ((64, 1, None), {"pipeline": 4}, (8, 1, None)),
        ((64, 1, None), {"pipeline": 4, "data": 2}, (16, 1, None)),
        ((64, 1, 8), {"pipeline": 4}, (8, 1, 4)),
        ((64, 1, 4), {"tensor": 2}, (4, 1, 2)),
        ((64, 1, 1), {}, (2, 1, 1)),
        ((10, 1, 4), {}, (3, 1, 2)),  # the last window is shorter
        ((20, 1, 8), {"pipeline": 4}, (12, 1, 8)),
        ((8, 1, 8), {"pipeline": 2}, (4, 1, None)),  # one window is none
    ],
)
def test_the_fewest_rows_that_do_all_the_schedule_does(
    tmp_path: Path, batch: tuple[int, int, int | None], sizes: dict[str, int], small: tuple[int, int, int | None]
) -> None:
    keys = ("global_batch_size", "micro_batch_size", "media_window")
    recipe = tiny_recipe(tmp_path, training=dict(zip(keys, batch, strict=True)))
    found = shrink_batch(recipe.training, GridSizes(**sizes))
    assert tuple(found[key] for key in keys) == small


def test_regexes_for_layers_that_are_gone_are_dropped(tmp_path: Path) -> None:
    freeze = [r"decoder\.layers\.27\.", r"\.input_layernorm\.", r"vision\..*layers\.20\."]
    model = large_recipe(tmp_path).model.model_dump() | {"freeze": freeze}
    small, _ = shrunk(large_recipe(tmp_path, model=model), 1)
    assert small.model.freeze == (r"\.input_layernorm\.",)


def write_samples(directory: Path, *changes: dict[str, Any]) -> Path:
    """The tiny data set's samples with changes to the first of them."""
    samples = json.loads(tiny_dataset(directory).read_text())
    for sample, change in zip(samples, changes, strict=False):
        sample |= change
    (directory / "changed.json").write_text(json.dumps(samples[: len(changes)]))
    return directory / "changed.json"


def test_samples_that_cannot_be_used_are_passed_over(tmp_path: Path) -> None:
    path = write_samples(tmp_path, {"conversations": []}, {"image": "nowhere.png"}, {}, {"id": None})
    recipe = tiny_recipe(tmp_path, data={"path": str(path), "media_root": str(tmp_path)})
    samples, longest = pick_samples(recipe, 16, 4)
    assert [sample["id"] for sample in samples] == ["3", "sample-2"]  # one image before three
    assert longest > 3 * 16


def test_no_usable_sample_is_the_users_error(tmp_path: Path) -> None:
    path = write_samples(tmp_path, {"conversations": []})
    recipe = tiny_recipe(tmp_path, data={"path": str(path), "media_root": str(tmp_path)})
    with pytest.raises(DataError, match="changed.json element 0"):
        pick_samples(recipe, 16, 4)


def test_samples_of_any_source_are_written_whole(tmp_path: Path) -> None:
    """Whole paths for files, and what a record holds in it: the small file lies in another folder."""
    tiny_dataset(tmp_path)
    images = [tmp_path / "images" / f"{name}.png" for name in ("1-0", "2-0")]
    uri = f"data:image/png;base64,{base64.b64encode(images[1].read_bytes()).decode()}"
    answer = {"role": "assistant", "content": "red"}
    parts = [{"type": "image", "image": "images/1-0.png"}, {"type": "image_url", "image_url": {"url": uri}}]
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": [{"role": "user", "content": parts}, answer]}]))
    recipe = tiny_recipe(tmp_path, data={"path": str(tmp_path / "chats.json"), "source": "messages"})
    samples, _ = pick_samples(recipe, 16, 4)
    elsewhere = tmp_path / "elsewhere" / "samples.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(json.dumps(samples))
    source = LlavaJson(elsewhere, "<image>")
    (sample,) = source.samples()
    assert sample.turns[0].text == "<image>\n<image>"
    reader = MediaReader(survey_tower(recipe.model.vision, recipe.model.projector).media_spec, "pad")
    found = [next(read_images(reader, [one], MediaStore.of(source, None), "s")) for one in sample.images]
    assert all(torch.equal(pixels, reader.read(path, "s")) for pixels, path in zip(found, images, strict=True))


@pytest.mark.parametrize(
    "parallel", [{"ring": 2}, {"ring": 4}, {"ulysses": 2}, {"ring": 2, "ulysses": 2}, {"ring": 2, "tensor": 2}]
)
def test_trained_tokens_stand_at_the_cuts_of_the_first_step(tmp_path: Path, parallel: dict[str, int]) -> None:
    """At all of them but those that the question of the longest text stands at: what a cut spoils is seen at once."""
    recipe = tiny_recipe(tmp_path, parallel=parallel | {"sequence": "tensor" in parallel})
    small, samples = shrunk(recipe, GridSizes(**parallel).world)
    path = tmp_path / "picked.json"
    path.write_text(json.dumps(samples[: small.training.global_batch_size]))
    encoder = ConversationEncoder(load_tokenizer(tiny_tokenizer(tmp_path), "<image>"), "auto", "<image>", 16)
    file = LlavaJson(path, "<image>")
    encoded = [encoder.encode(sample) for sample in file.samples()]
    length = max(len(of_one.ids) for of_one in encoded)
    cut = (parallel.get("ring", 1), parallel.get("ulysses", 1), parallel.get("tensor", 1))
    layout = SequenceLayout(padded_length(length, *cut), *cut)
    owners = torch.stack(layout.owners(torch.arange(layout.length)))  # [3, length]
    cuts = (owners[:, 1:] != owners[:, :-1]).any(0).nonzero().flatten().tolist()  # last token before each
    trained = {at for at in cuts for labels in (of_one.labels for of_one in encoded) if is_trained(labels, at + 1)}
    assert {at for at in cuts if at >= 12} <= trained and len(trained) > len(cuts) / 2


def is_trained(labels: list[int], at: int) -> bool:
    return at < len(labels) and labels[at] != IGNORE


def test_samples_of_a_mixture_are_of_all_its_sources(tmp_path: Path) -> None:
    """Each with its own marker and folder of images; the small recipe has them in one file."""
    for name, marker in (("a", "<image>"), ("b", "<img>")):
        folder = tmp_path / name
        folder.mkdir()
        records = json.loads(tiny_dataset(folder).read_text().replace("<image>", marker))
        (folder / "named.json").write_text(
            json.dumps([{**record, "id": f"{name}-{record['id']}"} for record in records])
        )
    sources = {
        "a": {"path": str(tmp_path / "a" / "named.json")},
        "b": {"path": str(tmp_path / "b" / "named.json"), "image_token": "<img>"},
    }
    mixture = {"path": None, "mixture": "a + b*0.5", "sources": sources, "held_out": 0.1}
    small, samples = shrunk(tiny_recipe(tmp_path, data=mixture), 1)
    assert (small.data.mixture, small.data.sources, small.data.held_out) == (None, {}, 0.0)
    assert {sample["id"][0] for sample in samples} == {"a", "b"}
    for sample in samples:
        assert sum(turn["value"].count("<image>") for turn in sample["conversations"]) == len(sample["image"])
        assert all(Path(image).parts[-3] == sample["id"][0] for image in sample["image"])
