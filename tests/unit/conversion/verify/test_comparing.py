"""The question two models are asked, and what they must have in common."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.conversion.formats.base import AskedAs
from megatron_vlm.conversion.verify.comparing import NUM_RANDOM_TOKENS, _notes, make_probe
from megatron_vlm.conversion.verify.side import Facts, check_fit, coarsest, round_weights
from megatron_vlm.conversion.verify.trace import Anatomy, Probe, Trace, traced
from megatron_vlm.errors import ConversionError, DataError
from megatron_vlm.models.vision.preprocessing import PixelFormat
from tests.helpers.models.tiny import tiny_tokenizer

FACTS = Facts(
    vocabulary=400,
    hidden_size=8,
    decoder_layers=2,
    tower_width=6,
    tower_layers=1,
    image_height=12,
    image_width=8,
)
PIXELS = PixelFormat(12, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "{}")


@dataclass(frozen=True)
class Stub:
    """A side that cannot be run."""

    origin: str = "somewhere"
    facts: Facts = FACTS
    weights: torch.dtype = torch.float32
    pixels: PixelFormat = PIXELS
    tokenizer: Path | None = None
    asked: AskedAs = AskedAs(template="auto", image_mode="pad", image_token="<image>")

    def trace(self, probe: Probe, weights: torch.dtype) -> Trace:
        raise AssertionError("not asked for")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_without_image_and_prompt_there_is_one_of_random_pixels_in_random_text():
    probe = make_probe(Stub(), Stub(), (), "")
    assert probe.pixels.shape == (1, 3, 12, 8) and probe.pixels.std() > 0.5
    assert [len(piece) for piece in probe.pieces] == [NUM_RANDOM_TOKENS] * 2
    assert len(set(probe.pieces[0])) > NUM_RANDOM_TOKENS // 2
    again = make_probe(Stub(), Stub(), (), "")
    assert again.pieces == probe.pieces and torch.equal(again.pixels, probe.pixels)


def test_random_text_is_of_the_smaller_vocabulary():
    probe = make_probe(Stub(), Stub(facts=replace(FACTS, vocabulary=5)), (), "")
    assert {token for piece in probe.pieces for token in piece} == {1, 2, 3, 4} and probe.placeholder == 0


def test_the_placeholder_is_in_no_text():
    probe = Probe(((1, 0), (2,)), torch.zeros(1, 3, 2, 2), placeholder=7)
    assert probe.ids(3).tolist() == [[1, 0, 7, 7, 7, 2]]


def test_a_prompt_is_cut_by_the_tokenizer_of_either(tokenizer):
    from megatron_vlm.data.text.tokenizer import load_tokenizer

    cut = load_tokenizer(tokenizer, "<image>")
    for sides in ((Stub(tokenizer=tokenizer), Stub()), (Stub(), Stub(tokenizer=tokenizer))):
        probe = make_probe(*sides, (), "the <image> green")
        assert probe.pieces == (tuple(cut("the ")["input_ids"]), tuple(cut(" green")["input_ids"]))
        assert probe.placeholder not in {token for piece in probe.pieces for token in piece}
    first = make_probe(Stub(tokenizer=tokenizer), Stub(), (), "green").pieces
    assert first == ((), tuple(cut("\ngreen")["input_ids"]))


def test_a_prompt_that_cannot_be_asked_is_an_error(tokenizer):
    known = Stub(tokenizer=tokenizer)
    with pytest.raises(ConversionError, match="neither somewhere nor somewhere has a tokenizer"):
        make_probe(Stub(), Stub(), (), "green")
    with pytest.raises(DataError, match="--prompt: found 2 <image> in it, needs 1"):
        make_probe(known, known, (), "<image> green <image>")
    with pytest.raises(ConversionError, match="outside the models' vocabulary of 9"):
        make_probe(known, Stub(facts=replace(FACTS, vocabulary=9)), (), "green")


@pytest.mark.parametrize("field", [name for name in Facts.__dataclass_fields__ if name != "vocabulary"])
def test_other_facts_do_not_fit(field):
    other = replace(FACTS, **{field: 99})
    with pytest.raises(ConversionError, match=f"one architecture: {field} {getattr(FACTS, field)} and 99$"):
        check_fit(Stub(), Stub(facts=other))


def test_vocabularies_may_differ_by_padding_only():
    check_fit(Stub(), Stub(facts=replace(FACTS, vocabulary=464)))
    with pytest.raises(ConversionError, match="vocabulary 400 and 600"):
        check_fit(Stub(), Stub(facts=replace(FACTS, vocabulary=600)))


def test_notes_say_what_differs(tokenizer, tmp_path):
    same = Stub(tokenizer=tokenizer)
    assert list(_notes(same, same)) == []
    other = Stub(
        facts=replace(FACTS, vocabulary=464), weights=torch.bfloat16, pixels=replace(PIXELS, mean=(0.0, 0.0, 0.0))
    )
    assert list(_notes(same, other)) == [
        "A's vocabulary has 400 rows, B's 464: logits of the first 400 are compared",
        "A's weights are float32, B's bfloat16",
        "pixels are normalised by different means and deviations; both were given A's",
        "B has no tokenizer",
    ]
    from megatron_vlm.data.text.new_tokenizer import train_tokenizer

    train_tokenizer(["other words altogether"], 300, tmp_path / "other", extra_special=())
    assert list(_notes(same, Stub(tokenizer=tmp_path / "other"))) == ["the tokenizers differ"]


def test_weights_are_rounded_to_the_coarsest_format():
    assert coarsest({torch.float32, torch.float16}) is torch.float16
    assert coarsest({torch.float16, torch.bfloat16, torch.int64}) is torch.bfloat16
    module = torch.nn.Linear(3, 3)
    before = module.weight.detach().clone()
    round_weights(module, torch.bfloat16)
    assert module.weight.dtype is torch.float32 and not torch.equal(module.weight, before)
    assert torch.equal(module.weight, before.bfloat16().float())


class Layer(torch.nn.Module):
    """A decoder layer in small, which adds in place as megatron-core does."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.mlp = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        attended: Any = self.attend(hidden_states)
        attended += hidden_states
        return attended + self.mlp(attended), None


@torch.no_grad()
def test_values_are_those_of_the_moment_and_the_hooks_go():
    tower, projector, norm = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    layers = torch.nn.ModuleList([Layer(), Layer()])
    anatomy = Anatomy([tower], 0, projector, list(layers), "attend", "mlp", norm)
    trace, x = Trace(1), torch.randn(1, 5, 2)

    def run() -> None:
        hidden = projector(tower(x))
        for layer in layers:
            hidden = layer(hidden_states=hidden)[0]
        norm(hidden)

    with traced(anatomy, trace):
        run()
    decoder = [f"decoder layer {i}{part}" for i in range(2) for part in (" attention", " MLP", "")]
    assert list(trace.values) == ["tower embeddings", "projector", "embedding", *decoder, "final norm"]
    expected = layers[0].attend(trace.values["embedding"])
    torch.testing.assert_close(trace.values["decoder layer 0 attention"], expected)
    run()  # nothing is recorded twice
    assert trace.values["tower embeddings"].shape == (5, 2)
