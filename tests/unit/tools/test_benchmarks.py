"""What the throughput benchmark's sides train on, and when two sides count as the same."""

import math

import pytest

from megatron_vlm.config.schema import DataConfig
from megatron_vlm.data.sample import IGNORE
from megatron_vlm.data.sources.llava_json import LlavaJson
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.vision.media_spec import MediaSpec
from tools.benchmarks.training import synthetic
from tools.benchmarks.training.throughput import FIRST_LOSS_TOLERANCE, SidesDifferError, refuse_unless_equal

SPEC = MediaSpec(tokens_per_image=16, num_patches=16, height=28, width=28, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize("answers", [0.5, 1.0])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_every_sample_has_its_size_and_the_share_of_answers(tmp_path, answers, images):
    shape = synthetic.Shape(sequence_length=400, vocab_size=500, spec=SPEC, answers=answers)
    size = synthetic.SampleSize(284 + images * 16, images)
    synthetic.make(tmp_path / "data", shape, [size] * 3, DataConfig(path="none"))
    sections = synthetic.sections(tmp_path / "data")
    tokenizer = load_tokenizer(sections["model"]["language"]["tokenizer"], "<image>")
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", SPEC.tokens_per_image)
    samples = list(LlavaJson(sections["data"]["path"], "<image>").samples())
    assert len(samples) == 3 and len({sample.turns for sample in samples}) == 3
    for sample in samples:
        encoded = encoder.encode(sample)
        assert len(encoded.ids) == size.tokens and len(encoded.image_starts) == images
        assert max(encoded.ids) < 499  # the last id is left for the images' places
        trained = sum(label != IGNORE for label in encoded.labels)
        assert trained / 284 == pytest.approx(0.5 if answers == 0.5 else 0.95, abs=0.05)


def test_a_row_too_short_for_an_image_is_refused(tmp_path):
    shape = synthetic.Shape(sequence_length=20, vocab_size=100, spec=SPEC, answers=0.5)
    with pytest.raises(ConfigError, match="training.sequence_length: found 20, needed 2[0-9]"):
        synthetic.make(
            tmp_path / "data", shape, [synthetic.SampleSize(shape.sequence_length, 1)], DataConfig(path="none")
        )


def test_sides_that_agree_pass():
    refuse_unless_equal([10.0, 9.0, 8.0], [10.0005, 9.05, 8.0], "fp32")
    refuse_unless_equal([10.05, 9.0], [10.0, 9.0], "bf16")


@pytest.mark.parametrize(
    ("ours", "theirs", "step"),
    [([10.0, 9.0], [10.01, 9.0], 1), ([10.0, 9.0], [10.0, 9.2], 2), ([10.0, math.nan], [10.0, 9.0], 2)],
)
def test_sides_that_differ_are_refused(ours, theirs, step):
    assert FIRST_LOSS_TOLERANCE["fp32"] == 1e-4
    with pytest.raises(SidesDifferError, match=f"loss of step {step} is"):
        refuse_unless_equal(ours, theirs, "fp32")
