"""The Triton attention against plain torch: every mask, odd shapes, forward and backward; and what must be noticed."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlm.ops import attention_cuda
from megatron_vlm.ops.attention import attention, attention_backward
from megatron_vlm.ops.attention_mask import Band
from tests.helpers.faults.mutants import mutant
from tests.helpers.models.plain_attention import SCALE, draw, finite, sides
from tests.helpers.quick_interpreter import quick_interpreter
from tests.kernels.accuracy import assert_as_exact

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    """Under the interpreter each operation takes half a millisecond."""
    with quick_interpreter():
        yield


CASES: list[tuple[tuple[int, int], tuple[int, int], tuple[int, int], dict[str, Any]]] = [
    # (queries, keys), (heads, kv heads), (d, dv), rules
    ((17, 17), (8, 2), (16, 16), dict(causal=True)),
    ((35, 50), (1, 1), (20, 8), dict(causal=True, window=9)),
    ((9, 70), (2, 1), (72, 80), dict(causal=False, softcap=0.7)),
    ((20, 9), (7, 1), (8, 11), dict(causal=True)),  # eleven queries see nothing
    ((35, 20), (6, 3), (80, 16), dict(causal=True, offset=5, softcap=2.0)),
    ((33, 40), (2, 1), (16, 16), dict(causal=False, window=12, offset=30)),  # the last queries see nothing
    ((1, 37), (4, 2), (16, 16), dict(causal=True)),
    ((4, 6), (2, 1), (8, 8), dict(causal=True, offset=-4)),  # nobody sees anything
]
PADDED = [((17, 20), (2, 1), (16, 16), dict(causal=True)), ((9, 40), (2, 2), (16, 16), dict(causal=True, window=9))]


def results(tensors: dict[str, Tensor], rules: dict[str, Any], backend: str = "triton") -> dict[str, Tensor]:
    """out, lse and the fp32 gradients, from the backend's own final out and log-sum-exp."""
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    out, lse = attention(q, k, v, softmax_scale=SCALE, backend=backend, **rules)
    gradients = attention_backward(dout, q, k, v, out, lse, softmax_scale=SCALE, backend=backend, **rules)
    assert out.dtype == q.dtype and all(x.dtype == torch.float32 for x in (lse, *gradients))
    return finite({"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))})


def check(tensors: dict[str, Tensor], rules: dict[str, Any]) -> None:
    assert_as_exact(results(tensors, rules), *sides(tensors, rules))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_as_exact_as_plain_torch(case: Any, dtype: torch.dtype, device: str) -> None:
    lengths, heads, widths, rules = case
    check(draw(lengths, heads, widths, device, dtype, rows=1), rules)


def test_fp16(device: str) -> None:
    check(draw((35, 50), (4, 2), (20, 16), device, torch.float16, rows=1), dict(causal=True, window=30, softcap=2.0))


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_hidden_keys(case: Any, device: str) -> None:
    """Row 0 ends with five of them, row 1 begins with three and hides every second; some queries see none."""
    lengths, heads, widths, rules = case
    valid = torch.ones(2, lengths[1], dtype=torch.bool, device=device)
    valid[0, -5:], valid[1, :3], valid[1, ::2] = False, False, False
    check(draw(lengths, heads, widths, device, torch.float32), {**rules, "key_valid": valid})


def test_inputs_need_not_be_contiguous(device: str) -> None:
    """[s, b, heads, d] storage, as mcore's; heads before positions, as the kv cache's; a gradient of one number."""
    tensors = draw((9, 20), (2, 1), (16, 16), device, torch.float32)
    expected = results(tensors, dict(causal=True))
    moved = {"q": tensors["q"].transpose(0, 1).contiguous().transpose(0, 1), "dout": tensors["dout"]}
    moved |= {name: tensors[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "kv"}
    for name, tensor in results(moved, dict(causal=True)).items():
        assert torch.equal(tensor, expected[name]), name
    leaves = [tensors[name].clone().requires_grad_() for name in "qkv"]
    out, _ = attention(*leaves, causal=True, softmax_scale=SCALE, backend="triton")
    out.sum().backward()
    ones = tensors | {"dout": torch.ones_like(tensors["dout"])}
    for leaf, name in zip(leaves, ("dq", "dk", "dv"), strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, results(ones, dict(causal=True))[name])


def test_it_repeats_bit_by_bit(device: str) -> None:
    tensors = draw((17, 17), (2, 1), (16, 16), device, torch.float32, rows=1)
    first, second = (results(tensors, dict(causal=True)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def shifted(band: Band) -> Band:
    """Every query sees one key more."""
    return Band(band.lower, None if band.upper is None else band.upper + 1)


FAULTS = {  # what is written in a module of the kernels -> what should have been, and the first number it spoils
    "groups": ("attention", "        heads // kv_heads,", "        heads,", "out"),
    "groups of dq": ("attention_backward", "(head // group)", "(head // group * 0)", "dq"),
    "soft-cap without slope": ("attention_backward", "ds = ds * (1.0 - tangent * tangent)", "ds = ds * 1.0", "dq"),
}


@pytest.mark.parametrize("fault", [*FAULTS, "band", "a block's own lse"])
def test_wrong_variants_are_noticed(fault: str, monkeypatch: pytest.MonkeyPatch, device: str, tmp_path: Path) -> None:
    import megatron_vlm_kernels

    rules: dict[str, Any] = dict(causal=True, softcap=0.7)
    tensors = draw((20, 20), (4, 2), (16, 16), device, torch.float32, rows=1)
    expected = sides(tensors, rules)
    wrong = results(tensors, rules)
    assert_as_exact(wrong, *expected)
    spoilt = "out"
    if fault in FAULTS:
        name, right, written, spoilt = FAULTS[fault]
        module = mutant(f"megatron_vlm_kernels.{name}", right, written, tmp_path)
        monkeypatch.setattr(megatron_vlm_kernels, name, module)
        wrong = results(tensors, rules)
    elif fault == "band":
        original = attention_cuda.band_of
        monkeypatch.setattr(attention_cuda, "band_of", lambda *arguments: shifted(original(*arguments)))
        wrong = results(tensors, rules)
    else:
        q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
        options: dict[str, Any] = dict(causal=True, softmax_scale=SCALE, backend="triton", offset=0, softcap=0.7)
        out, lse = attention(q, k[:, :9], v[:, :9], **options)
        gradients = attention_backward(dout, q, k, v, out, lse, **options)
        wrong |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        spoilt = "dq"
    with pytest.raises(AssertionError, match=f"{spoilt}: error"):
        assert_as_exact(wrong, *expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rules", [dict(causal=True), dict(causal=True, window=50), dict(causal=False)], ids=str)
def test_many_tiles(rules: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Tiles that no edge crosses, tiles that nobody visits, and every stage of the pipeline."""
    size = 600 if device == "cuda" else 150
    check(draw((size - 7, size), (4, 2), (64, 64), device, dtype, rows=1), rules)
