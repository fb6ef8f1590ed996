"""What a caller hands over, read and padded."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_vlm.errors import DataError
from megatron_vlm.generation.prompts import read_prompt
from tests.helpers.faults.odd_files import ODD
from tests.unit.generation.questions import batch_of


def plain() -> Image.Image:
    return Image.new("RGB", (8, 6), (200, 10, 10))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "an image.png"
    plain().save(path)
    return path


def text_of(prompt, number=1) -> str:
    return read_prompt(prompt, "<image>", number)[0].turns[0].text


def test_images_stand_where_they_are_given():
    image = plain()
    assert text_of("What?") == "What?"
    assert text_of([image, "What?"]) == "<image>\nWhat?"
    assert text_of([image, image, "Which?"]) == "<image>\n<image>\nWhich?"
    assert text_of(["First", image, "and then", image]) == "First\n<image>\nand then\n<image>"


def test_markers_in_the_text_say_where_images_belong():
    assert text_of([plain(), "This <image> is?"]) == "This <image> is?"


def test_paths_are_told_from_texts(saved):
    sample, images = read_prompt([str(saved), saved, "Is it in photo.png"], "<image>", 1)
    assert images == [saved, saved] and sample.images == (str(saved), str(saved))
    assert sample.turns[0].text == "<image>\n<image>\nIs it in photo.png"


@pytest.mark.parametrize("missing", ["nowhere/a.png", Path("nowhere/a"), "a.JPG"])
def test_a_missing_image_is_an_error_that_names_it(missing):
    with pytest.raises(DataError, match=f"prompt 4: image '{missing}' does not exist"):
        read_prompt([missing, "What?"], "<image>", 4)


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_told_before_it_is_opened(tmp_path, kind):
    make, expected = ODD[kind]
    with pytest.raises(DataError, match=f"prompt 4: image '.*' cannot be read: .*{expected}"):
        read_prompt([make(tmp_path / "a.png"), "What?"], "<image>", 4)


def test_a_folder_of_frames_is_an_image(tmp_path):
    assert read_prompt([tmp_path, "What?"], "<image>", 1)[1] == [tmp_path]


def test_half_a_character_of_a_command_line_is_told():
    with pytest.raises(DataError, match=r"prompt 1: found 'caf\\udce9\?', which holds half a character"):
        read_prompt(b"caf\xe9?".decode("utf-8", "surrogateescape"), "<image>", 1)


@pytest.mark.parametrize("prompt", [[], [""], [plain()], "  "])
def test_a_prompt_without_text_is_an_error(prompt):
    with pytest.raises(DataError, match="prompt 1 has no text"):
        read_prompt(prompt, "<image>", 1)


def test_anything_else_is_an_error():
    with pytest.raises(DataError, match="found a int, needs texts"):
        read_prompt([3, "What?"], "<image>", 1)


def test_rows_are_padded_on_the_left(pair, prompts):
    batch = batch_of(pair, prompts)
    lengths = batch.valid.sum(1)
    assert lengths.max() == batch.ids.shape[1] and lengths.min() < lengths.max()
    for row, length in enumerate(lengths.tolist()):
        assert batch.valid[row, -length:].all() and not batch.valid[row, :-length].any()
        assert batch.position_ids[row, -length:].tolist() == list(range(length))
        alone = batch_of(pair, [prompts[row]])
        assert torch.equal(alone.ids[0], batch.ids[row, -length:])
    assert len(batch.images) == len(batch.spans) == 5
    for span in batch.spans:
        item = span.item
        placeholders = batch.ids[item.row, item.start : item.start + item.num_tokens]
        assert (placeholders == 0).all() and batch.valid[item.row, item.start]


def test_another_number_of_markers_than_images_is_an_error(pair):
    with pytest.raises(DataError, match="prompt 1.* has 1 image.* and 2 image marker"):
        pair.ours.generate([plain(), "<image> and <image>?"])
