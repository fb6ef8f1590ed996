"""What counts as a difference, where it is named, and how it is printed."""

import math

import pytest
import torch

from megatron_vlm.conversion.verify.report import (
    TOLERANCE,
    Comparison,
    Difference,
    compare_traces,
    top1_agreement,
)
from megatron_vlm.conversion.verify.trace import HEAD, Trace
from megatron_vlm.errors import ConversionError

NAN, INF = math.nan, math.inf


def trace(**values):
    """Places by their names with spaces for underscores."""
    return Trace(1, {name.replace("_", " "): torch.as_tensor(value) for name, value in values.items()})


def comparison(*places, **changes):
    settings = {"a": "one", "b": "other", "weights": "float32", "num_images": 1, "top1": 0.75, "num_positions": 40}
    return Comparison(places=places, **{**settings, **changes})


def difference(place, relative):
    return Difference(place, largest=relative * 2.0, mean=relative, deviation=2.0)


def test_differences_are_measured_in_deviations():
    a = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    b = a + torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    found = Difference.between("x", a, b)
    deviation = math.sqrt((a.double().var() + b.double().var()) / 2)
    assert (found.largest, found.mean) == (0.5, 0.125)
    assert found.deviation == pytest.approx(deviation) and found.relative == pytest.approx(0.5 / deviation)
    swapped = Difference.between("x", b, a)
    assert swapped.relative == found.relative  # neither side is the measure of the other


@pytest.mark.parametrize(
    ("a", "b", "agrees"),
    [
        ([[1.0, 1.0]], [[1.0, 1.0]], True),
        ([[1.0, 1.0]], [[1.0 + 1e-9, 1.0]], True),  # the same number in fp32
        ([[1.0, 1.0]], [[2.0, 2.0]], False),  # nothing varies, so no difference is small
        ([[1.0, 2.0]], [[1.0, NAN]], False),
        ([[1.0, NAN]], [[1.0, NAN]], False),
        ([[1.0, INF]], [[1.0, INF]], False),
        ([[1.0, 2.0]], [[1.0, 2.0 + 0.5 * TOLERANCE]], True),
        ([[1.0, 2.0]], [[1.0, 2.0 + 2 * TOLERANCE]], False),
    ],
)
def test_a_place_agrees_only_where_that_is_known(a, b, agrees):
    assert Difference.between("x", torch.tensor(a), torch.tensor(b)).agrees is agrees


def test_places_are_compared_in_the_order_of_the_forward_pass():
    a = trace(projector=[[1.0, 2.0]], embedding=[[1.0, 3.0]], head=[[1.0, 2.0]])
    b = trace(head=[[1.0, 2.0]], embedding=[[1.0, 3.0]], projector=[[1.0, 9.0]])
    assert [(d.place, d.agrees) for d in compare_traces(a, b)] == [
        ("projector", False),
        ("embedding", True),
        ("head", True),
    ]


def test_rows_of_padding_are_left_out_of_the_logits_and_of_nothing_else():
    a = trace(projector=[[1.0, 2.0]], head=[[1.0, 5.0], [2.0, 1.0]])
    b = trace(projector=[[1.0, 2.0]], head=[[1.0, 5.0, 9.0], [2.0, 1.0, 0.0]])
    assert all(place.agrees for place in compare_traces(a, b))
    assert top1_agreement(a, b) == 0.5  # but one that would be the answer is seen
    with pytest.raises(ConversionError, match=r"differ at projector: A gives \[1, 2\], B gives \[1, 3\]"):
        compare_traces(trace(projector=[[1.0, 2.0]]), trace(projector=[[1.0, 2.0, 3.0]]))


def test_other_parts_are_an_error_that_names_them():
    with pytest.raises(ConversionError, match="only one of them has decoder layer 1"):
        compare_traces(trace(head=[[1.0]]), trace(decoder_layer_1=[[1.0]], head=[[1.0]]))


def test_the_first_diverging_place_is_named_not_the_worst():
    found = comparison(
        difference("tower layer 0", 0.0),
        difference("decoder layer 4 attention", 0.2),
        difference("decoder layer 5", 3.0),
        difference(HEAD, 1.0),
    )
    assert found.first_diverging is not None and found.first_diverging.place == "decoder layer 4 attention"
    assert not found.agrees and found.logits.place == HEAD


def test_the_table_says_everything():
    found = comparison(
        difference("tower layer 0", 0.0),
        difference("tower layer 1", 1e-5),
        difference("decoder layer 4 attention", 0.2),
        difference("decoder layer 5", 3.0),
        difference(HEAD, 0.5),
        notes=("the tokenizers differ",),
    )
    lines = str(found).splitlines()
    assert lines[:4] == [
        "A  one",
        "B  other",
        "weights in float32, arithmetic in float32; 40 positions, 1 image",
        "note: the tokenizers differ",
    ]
    assert [line.split("  ")[0] for line in lines[6:9]] == [
        "tower (tower layer 1)",
        "decoder (decoder layer 5)",
        "head",
    ]
    assert lines[-5:] == [
        "logits: largest difference 1.00e+00 (5.00e-01 of their standard deviation), mean 5.00e-01 (2.50e-01)",
        "top-1 agreement: 75.00% of 40 positions",
        "tolerance: 1e-03 of a place's standard deviation",
        "first diverging place: decoder layer 4 attention (2.00e-01)",
        "A and B differ",
    ]


def test_agreement_and_what_is_not_a_number_are_printed():
    text = str(comparison(difference(HEAD, 0.0)))
    assert text.endswith("first diverging place: none\nA and B agree")
    broken = comparison(difference("tower layer 0", 5.0), difference("tower layer 1", NAN), difference(HEAD, 0.0))
    assert "tower (tower layer 1)" in str(broken)
