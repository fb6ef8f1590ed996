"""What attention's CUDA backends can do, told without a GPU: their obstacles, and how they are asked.

flash-attn's stand-in has its arguments (2.7 and later) and its mask (bottom-right windows, +inf for who sees nothing).
cuDNN's op is called on meta tensors, which checks its arguments and shapes.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import attention_cuda, reference
from megatron_vlm.ops.attention import ATTENTION, attention
from megatron_vlm.ops.attention_blocks import ATTENTION_INTO, Rectangle, Scoring
from megatron_vlm.ops.attention_mask import Asked, Band, asked_of, band_of
from tests.helpers.plain_attention import SCALE, draw, sides
from tests.unit.ops.test_attention_rules import RULES, inputs

HALF = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
SINGLE = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
FREE = Band(None, None)


def seen_in(band: Band, sq: int, sk: int) -> Tensor:
    """[sq, sk] bool, from the definition."""
    distance = torch.arange(sk)[None] - torch.arange(sq)[:, None]
    lower, upper = (-(10**6) if band.lower is None else band.lower), (10**6 if band.upper is None else band.upper)
    return (distance >= lower) & (distance <= upper)


@pytest.mark.parametrize(("sq", "sk", "kv_heads", "rules"), RULES)
def test_a_band_says_who_sees_whom(sq: int, sk: int, kv_heads: int, rules: dict[str, Any]) -> None:
    (q, k, _), _ = inputs(sq, sk, kv_heads)
    band = band_of(q, k, {**rules, "softmax_scale": 1.0})
    assert torch.equal(seen_in(band, sq, sk), reference.visible_keys(q, k, softmax_scale=1.0, **rules)[0, 0])
    for side in band:  # a side that is told hides something
        assert side is None or not seen_in(band, sq, sk).all()


@pytest.mark.parametrize(
    ("q", "softcap", "asked", "reason"),
    [
        (HALF, None, None, None),
        (HALF, None, Asked(64, 64, (128, 128), Band(None, 0), False), None),
        (HALF, None, Asked(64, 32, (128, 64), FREE, False), None),
        (SINGLE, None, None, "it needs torch.bfloat16 or torch.float16, found torch.float32"),
        (HALF, 2.0, None, "it has no soft-cap of the scores, found 2.0"),
        (HALF, None, Asked(64, 64, (128, 128), FREE, True), "it has no mask of single keys, found key_valid"),
        (HALF, None, Asked(64, 64, (128, 128), Band(-3, 0), False), "it has no window"),
        (HALF, None, Asked(64, 32, (128, 128), Band(None, 0), False), "its causal mask is of a square, found 64"),
        (HALF, None, Asked(64, 64, (128, 128), Band(None, 5), False), "its causal mask is of a square"),
        (HALF, None, Asked(1, 64, (128, 128), FREE, False), "it is not used for a single query or key"),
        (HALF, None, Asked(64, 64, (72, 70), FREE, False), "multiples of 8 up to 128, found (72, 70)"),
        (HALF, None, Asked(64, 64, (256, 256), FREE, False), "multiples of 8 up to 128"),
    ],
)
def test_what_cudnn_cannot(q: Any, softcap: float | None, asked: Asked | None, reason: str | None) -> None:
    found = attention_cuda.cudnn_obstacle(q, softcap, asked)
    assert found == reason if reason is None else found is not None and reason in found


def test_cudnn_is_asked_as_its_op_wants() -> None:
    q, dout = (torch.empty(2, 64, 8, 128, dtype=torch.bfloat16, device="meta") for _ in range(2))
    k, v = (torch.empty(2, 64, 2, 128, dtype=torch.bfloat16, device="meta") for _ in range(2))
    out, lse = attention_cuda.attention_cudnn(q, k, v, causal=True, softmax_scale=0.1)
    assert out.shape == q.shape and lse.shape == (2, 8, 64) and lse.dtype == torch.float32
    gradients = attention_cuda.attention_backward_cudnn(dout, q, k, v, out, lse, causal=True, softmax_scale=0.1)
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    assert all(x.dtype == torch.float32 for x in gradients)


def window_of(sq: int, sk: int, options: dict[str, Any]) -> dict[str, Any]:
    """flash-attn's window as rules of the twin: it counts from the diagonal that ends at the last key."""
    left, right = options["window_size_left"], options["window_size_right"]
    assert not options["causal"] or (left, right) == (-1, 0)
    assert options["dropout_p"] == 0.0 and options["alibi_slopes"] is None
    right = sk + sq if right < 0 else right
    return {
        "causal": True,
        "offset": sk - sq + right,
        "window": None if left < 0 else left + right + 1,
        "softcap": options["softcap"] or None,
        "softmax_scale": options["softmax_scale"],
    }


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package flash_attn that computes with the twin."""

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert options.pop("return_softmax") is False
        out, lse = reference.attention(q, k, v, **window_of(q.shape[1], k.shape[1], options))
        return out, lse.masked_fill(lse == -torch.inf, torch.inf), torch.empty(0), torch.empty(2)

    def backward(*tensors: Tensor, deterministic: bool, **options: Any) -> Tensor:
        dout, q, k, v, out, lse, *gradients = tensors
        assert deterministic and all(x.is_contiguous() for x in (lse, *gradients))
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        rules = window_of(q.shape[1], k.shape[1], options)
        for gradient, found in zip(
            gradients, reference.attention_backward(dout, q, k, v, out, lse, **rules), strict=True
        ):
            gradient.copy_(found)
        return torch.empty(0)

    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    vars(interface).update(_flash_attn_forward=forward, _flash_attn_backward=backward)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.8.3" if name == "flash_attn" else version(name))


@pytest.mark.parametrize(("sq", "sk", "kv_heads", "rules"), [*RULES, (5, 9, 3, dict(causal=True, softcap=2.0))])
def test_flash_attn_is_asked_for_the_same_mask(
    sq: int, sk: int, kv_heads: int, rules: dict[str, Any], flash_attn: None
) -> None:
    (q, k, v), dout = inputs(sq, sk, kv_heads)
    q, k, v = (x.detach() for x in (q, k, v))
    options = {**rules, "softmax_scale": 0.4}
    obstacle = attention_cuda.flash_obstacle(HALF, rules.get("softcap"), asked_of(q, k, v, options))
    if obstacle is not None:
        diagonal, (lower, upper) = sk - sq, band_of(q, k, options)
        assert "the diagonal that ends at the last key" in obstacle
        assert (lower is not None and lower > diagonal) or (upper is not None and upper < diagonal)
        return
    out, lse = attention_cuda.attention_flash(q, k, v, **options)
    expected = reference.attention(q, k, v, **options)
    torch.testing.assert_close((out, lse), expected)
    found = attention_cuda.attention_backward_flash(dout, q, k, v, out, lse, **options)
    torch.testing.assert_close(found, reference.attention_backward(dout, q, k, v, out, lse, **options))


def test_what_flash_attn_cannot(flash_attn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(64, 64, (128, 128), Band(-3, 0), False)
    assert attention_cuda.flash_obstacle(HALF, 2.0, asked) is None
    assert "found torch.float32" in str(attention_cuda.flash_obstacle(SINGLE, None))
    assert "key_valid" in str(attention_cuda.flash_obstacle(HALF, None, asked._replace(hides_keys=True)))
    assert "one head width" in str(attention_cuda.flash_obstacle(HALF, None, asked._replace(widths=(128, 64))))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6.3")
    assert attention_cuda.flash_obstacle(HALF, None) == "it needs flash_attn 2.7 or later, found 2.6.3"


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_a_library_that_is_missing_is_told() -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ConfigError, match="'flash_attn' cannot run: the package flash_attn is not installed"):
        attention(q, q, q, causal=True, softmax_scale=1.0, backend="flash_attn")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_what_our_kernels_cannot() -> None:
    q = torch.zeros(1, 4, 2, 8, dtype=torch.float64)
    with pytest.raises(ConfigError, match="'triton' cannot run: it needs one of torch.float32.* found torch.float64"):
        attention(q, q, q, causal=True, softmax_scale=1.0, backend="triton")
    wide = torch.zeros(1, 4, 2, 300)
    with pytest.raises(ConfigError, match=r"it needs head widths up to 256, found \(300, 300\)"):
        attention(wide, wide, wide, causal=True, softmax_scale=1.0, backend="triton")


def test_auto_passes_over_the_interpreter() -> None:
    q = torch.zeros(1, 4, 2, 8)
    assert ATTENTION.find("auto", q, None).name == "cpu"
    assert ATTENTION_INTO.find("auto", q, None).name == "calls"


@pytest.mark.parametrize(
    ("backend", "of_blocks"), [("auto", "auto"), ("triton", "triton"), ("cpu", "calls"), ("cudnn", "calls")]
)
def test_who_serves_blocks(backend: str, of_blocks: str) -> None:
    assert Scoring(1.0, backend=backend).of_blocks == of_blocks


def test_a_rectangle_finds_its_keys_in_a_message() -> None:
    """Rows one behind the other, a row every `pitch` keys; a view, so that gradients can be added."""
    message = torch.arange(60.0).view(1, 20, 3, 1)
    rectangle = Rectangle((1, 4), (0, 2), (5, 7), causal=False, offset=0, pitch=4)
    view = rectangle.of_keys(message)
    assert torch.equal(view, torch.stack([message[0, at : at + 2] for at in (5, 9, 13)]))
    view += 1
    assert message[0, 5, 0, 0] == 16 and message[0, 7, 0, 0] == 21


@pytest.mark.parametrize("rules", [dict(causal=True, softcap=0.7), dict(causal=True, window=3)], ids=str)
def test_what_kernels_are_measured_against_is_the_twin(rules: dict[str, Any]) -> None:
    """The helper of the kernels' tests, in fp64, with queries that see nothing."""
    tensors = draw((9, 6), (4, 2), (8, 5), "cpu", torch.float64)
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    out, lse = reference.attention(*leaves, softmax_scale=SCALE, **rules)
    gradients = torch.autograd.grad(out, leaves, tensors["dout"])
    _, found = sides({name: tensor.detach() for name, tensor in tensors.items()}, rules)
    assert found["blind"].any() and torch.equal(found["blind"].bool(), lse == -torch.inf)
    torch.testing.assert_close([found[name] for name in ("out", "dq", "dk", "dv")], [out.detach(), *gradients])
