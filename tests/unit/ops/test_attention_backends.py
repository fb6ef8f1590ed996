"""What attention's CUDA backends can do, told without a GPU: their obstacles, and how they are asked.

flash-attn's stand-in has its arguments (2.7 and later) and its mask (bottom-right windows, +inf for who sees nothing).
cuDNN's op is called on meta tensors, which checks its arguments and shapes.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vlm.errors import ConfigError
from megatron_vlm.ops import attention_cuda, dispatch, reference
from megatron_vlm.ops.attention import ATTENTION, attention, attention_backward
from megatron_vlm.ops.attention_blocks import (
    ATTENTION_INTO,
    ATTENTION_INTO_BACKWARD,
    Rectangle,
    Rectangles,
    SavedForward,
    Scoring,
    attention_into,
    attention_into_backward,
)
from megatron_vlm.ops.attention_mask import AttentionCall, Band, attention_call, band_of
from megatron_vlm.parallel.layout import Documents, SequenceLayout
from megatron_vlm.parallel.ring_plan import RingPlan
from tests.helpers.data.packed import random_documents
from tests.helpers.models.plain_attention import SCALE, draw, sides
from tests.unit.ops.attention_rules import RULES, inputs

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
    ("q", "softcap", "call", "reason"),
    [
        (HALF, None, None, None),
        (HALF, None, AttentionCall(64, 64, (128, 128), Band(None, 0), False), None),
        (HALF, None, AttentionCall(64, 32, (128, 64), FREE, False), None),
        (SINGLE, None, None, "it needs torch.bfloat16 or torch.float16, found torch.float32"),
        (HALF, 2.0, None, "it has no soft-cap of the scores, found 2.0"),
        (HALF, None, AttentionCall(64, 64, (128, 128), FREE, True), "it has no mask of single keys, found key_valid"),
        (HALF, None, AttentionCall(64, 64, (128, 128), Band(-3, 0), False), "it has no window"),
        (
            HALF,
            None,
            AttentionCall(64, 32, (128, 128), Band(None, 0), False),
            "its causal mask is of a square, found 64",
        ),
        (HALF, None, AttentionCall(64, 64, (128, 128), Band(None, 5), False), "its causal mask is of a square"),
        (HALF, None, AttentionCall(1, 64, (128, 128), FREE, False), "it is not used for a single query or key"),
        (HALF, None, AttentionCall(64, 64, (72, 70), FREE, False), "multiples of 8 up to 128, found (72, 70)"),
        (HALF, None, AttentionCall(64, 64, (256, 256), FREE, False), "multiples of 8 up to 128"),
    ],
)
def test_what_cudnn_cannot(q: Any, softcap: float | None, call: AttentionCall | None, reason: str | None) -> None:
    found = attention_cuda.cudnn_obstacle(q, softcap, call)
    assert found == reason if reason is None else found is not None and reason in found


@pytest.mark.parametrize("num_queries", [4, 63, 64])
def test_auto_passes_over_cudnn_for_few_queries(num_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries of a group that one token has; by name it runs as before."""
    monkeypatch.setattr(dispatch, "_triton_device", lambda: "cuda")
    call = AttentionCall(num_queries, 777, (128, 128), FREE, False)
    few = num_queries < 64
    assert (ATTENTION.find("auto", HALF, None, call).name == "cudnn") == (not few)
    assert ATTENTION.find("cudnn", HALF, None, call).name == "cudnn"
    reason = attention_cuda.cudnn_objection(HALF, None, call)
    told = f"rebuilt for each length, which fewer than 64 queries are not worth, found {num_queries}"
    assert (told in str(reason)) == few


@pytest.mark.parametrize(
    ("packed", "gathers", "refusal"),
    [
        (False, False, None),
        (False, True, "its causal mask is of a square"),
        (True, False, "it is not used for a single query or key"),
        (True, True, "its causal mask is of a square"),
    ],
)
def test_in_a_ring_flash_attn_can_what_cudnn_cannot(packed: bool, gathers: bool, refusal: str | None) -> None:
    """Why a recipe may name one, and the other only with whole rows that travel."""
    documents = (random_documents(1024, 9, 1), random_documents(1024, 60, 2)) if packed else (Documents.whole(1024),)
    plan, found = RingPlan(SequenceLayout(1024, 4), documents), []
    for rank in range(4):
        shares = [plan.gathered_requests(rank)] if gathers else [plan.requests(rank, step) for step in range(4)]
        for call in (call for share in itertools.chain(*shares) for call in share.calls):
            q, k = (torch.empty(1, len(at), 1, 128, device="meta") for at in (call.queries, call.keys))
            rules: Any = {"causal": call.causal, "offset": call.offset, "window": call.window, "softmax_scale": 1.0}
            call = attention_call(q, k, k, rules)
            assert min(attention_cuda._flash_window(call)) >= -1, call
            found.append(attention_cuda.cudnn_obstacle(HALF, None, call))
    assert None in found and any(reason for reason in found) == (refusal is not None)
    assert refusal is None or any(refusal in reason for reason in found if reason is not None)


def test_blocks_tell_what_auto_took(monkeypatch: pytest.MonkeyPatch) -> None:
    q, v = torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8)
    totals = torch.zeros(1, 4, 2, 8), torch.full((1, 2, 4), -torch.inf)
    blocks = Rectangles((Rectangle((0, 1), (0, 4), (0, 4), causal=True, offset=0),))
    monkeypatch.setattr(ATTENTION_INTO, "_announced", set())
    monkeypatch.setattr(ATTENTION_INTO_BACKWARD, "_announced", set())
    told: list[str] = []
    monkeypatch.setattr(dispatch.get_logger(dispatch.__name__), "info", lambda text, *of: told.append(text % of))
    for _ in range(2):
        attention_into(q, q, v, totals, blocks, Scoring(1.0))
    gradients = torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(v)
    attention_into_backward(SavedForward(v, q, *totals), q, v, gradients, blocks, Scoring(1.0))
    said = [one for one in told if "of blocks" in one]
    assert said == ["ops.attention of blocks: auto took 'calls'"] * 2  # forward, backward


def test_one_dtype_is_needed() -> None:
    """A kernel would read the bytes of another one as its own."""
    q = torch.ones(1, 4, 2, 8)
    for k, v in ((q.bfloat16(), q), (q, q.bfloat16())):
        with pytest.raises(AssertionError, match="attention needs one dtype, found q torch.float32, k torch"):
            attention(q, k, v, causal=True, softmax_scale=1.0)
        with pytest.raises(AssertionError, match="attention needs one dtype"):
            attention_backward(q, q, k, v, q, torch.zeros(1, 2, 4), causal=True, softmax_scale=1.0)


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
def forgetful() -> Iterator[None]:
    """What is known of the package flash_attn is of this test alone."""
    attention_cuda._flash_package_obstacle.cache_clear()
    yield
    attention_cuda._flash_package_obstacle.cache_clear()


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
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
    interface.__spec__ = importlib.machinery.ModuleSpec("flash_attn.flash_attn_interface", None)
    vars(interface).update(_flash_attn_forward=forward, _flash_attn_backward=backward)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"flash_attn": "2.8.3.post1"}[name])


@pytest.mark.parametrize(("sq", "sk", "kv_heads", "rules"), [*RULES, (5, 9, 3, dict(causal=True, softcap=2.0))])
def test_flash_attn_is_asked_for_the_same_mask(
    sq: int, sk: int, kv_heads: int, rules: dict[str, Any], flash_attn: None
) -> None:
    (q, k, v), dout = inputs(sq, sk, kv_heads)
    q, k, v = (x.detach() for x in (q, k, v))
    options = {**rules, "softmax_scale": 0.4}
    obstacle = attention_cuda.flash_obstacle(HALF, rules.get("softcap"), attention_call(q, k, v, options))
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
    call = AttentionCall(64, 64, (128, 128), Band(-3, 0), False)
    assert attention_cuda.flash_obstacle(HALF, 2.0, call) is None
    assert "found torch.float32" in str(attention_cuda.flash_obstacle(SINGLE, None))
    assert "key_valid" in str(attention_cuda.flash_obstacle(HALF, None, call._replace(hides_keys=True)))
    assert "one head width" in str(attention_cuda.flash_obstacle(HALF, None, call._replace(widths=(128, 64))))


@pytest.mark.parametrize(("version", "able"), [("2.6.3", False), ("2.10.0", True), ("2.7rc1", True), ("of git", False)])
def test_old_versions_of_flash_attn_are_refused(
    version: str, able: bool, flash_attn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reason = None if able else f"it needs flash_attn 2.7 or later, found {version}"
    assert attention_cuda.flash_obstacle(HALF, None) == reason


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash_attn is installed")
def test_a_library_that_is_missing_is_told(forgetful: None) -> None:
    with pytest.raises(ConfigError, match="'flash_attn' cannot run: the package flash_attn is not installed"):
        ATTENTION.find("flash_attn", HALF, None)
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ConfigError, match="'flash_attn' cannot run: it needs tensors on a CUDA device, found cpu"):
        attention(q, q, q, causal=True, softmax_scale=1.0, backend="flash_attn")


def test_a_flash_attn_without_metadata_is_an_obstacle(flash_attn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a source checkout on the path."""

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    reason = "it needs flash_attn 2.7 or later, found one without metadata that tell its version"
    assert attention_cuda.flash_obstacle(HALF, None) == reason
    assert ATTENTION.find("auto", torch.zeros(1, 4, 2, 8), None).name == "cpu"


def package_on_the_path(files: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package flash_attn of these files."""
    (folder / "flash_attn").mkdir()
    for name, text in files.items():
        (folder / "flash_attn" / name).write_text(text)
    for name in [one for one in sys.modules if one.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"cute.py": ""}, "it needs flash_attn.flash_attn_interface, which the package flash_attn found here does not"),
        ({"__init__.py": "raise ImportError('undefined symbol')"}, "cannot be imported: undefined symbol"),
        ({"__init__.py": "import nowhere_to_be_found"}, "cannot be imported: No module named 'nowhere_to_be_found'"),
    ],
)
def test_another_flash_attn_is_an_obstacle(
    files: dict[str, str], reason: str, forgetful: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flash-attn-4 has flash_attn.cute alone; one that was built for another torch raises when it is imported."""
    package_on_the_path(files, tmp_path, monkeypatch)
    assert reason in str(attention_cuda.flash_obstacle(HALF, None))
    sys.modules.pop("flash_attn", None)


def test_the_package_is_looked_up_once_and_on_the_cpu_never(flash_attn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr(importlib.metadata, "version", lambda name: looked.append(name) or "2.8.3")
    q = torch.zeros(1, 4, 2, 8)
    assert attention_cuda.flash_obstacle(q, None) is not None and not looked
    for _ in range(3):
        assert attention_cuda.flash_obstacle(HALF, None) is None
    assert looked == ["flash_attn"]


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
