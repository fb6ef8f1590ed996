"""The fused output projection and cross entropy against its twin, on one rank; more ranks in tests/distributed."""

import pytest
import torch

from megatron_vlm.ops import cross_entropy, reference
from megatron_vlm.ops.cross_entropy import linear_cross_entropy

T, H, V, PADDED = 23, 8, 50, 54


def case(dtype=torch.float32):
    torch.manual_seed(0)
    hidden = (3 * torch.randn(T, H)).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, H).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (T,))
    labels[::5] = -100
    return hidden, weight, labels


def gradients(loss, *inputs):
    return torch.autograd.grad((loss * torch.linspace(0.5, 2.0, T)).sum(), inputs)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 23, 1000])
def test_equals_twin_with_gradients(chunk_tokens):
    hidden, weight, labels = case()
    ours = linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None, chunk_tokens=chunk_tokens)
    twin = reference.linear_cross_entropy(hidden, weight, labels, vocab_size=V)
    assert ours.dtype == torch.float32 and (ours[::5] == 0).all()
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(ours, hidden, weight), gradients(twin, hidden, weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert (gradients(linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None), weight)[0][V:] == 0).all()


def test_fp64_passes_gradcheck():
    hidden, weight, labels = (x[:5] if i != 1 else x for i, x in enumerate(case(torch.float64)))
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, vocab_size=V, group=None, chunk_tokens=2), (hidden, weight)
    )


def test_padding_rows_that_take_part_are_seen():
    """The deliberately wrong variant: the padded size taken for the vocabulary."""
    hidden, weight, labels = case()
    twin = reference.linear_cross_entropy(hidden, weight, labels, vocab_size=V)
    wrong = linear_cross_entropy(hidden, weight, labels, vocab_size=PADDED, group=None)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [3, 9, 1000])
def test_small_pieces_on_the_cpu_change_nothing(chunk_tokens, monkeypatch):
    """Of some pieces the log-probabilities are kept, of others the logits are computed again."""
    monkeypatch.setattr(cross_entropy, "CPU_PIECE_BYTES", 4 * V * 4)
    hidden, weight, labels = case()
    ours = linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None, chunk_tokens=chunk_tokens)
    twin = reference.linear_cross_entropy(hidden, weight, labels, vocab_size=V)
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-6)
    expected = gradients(twin, hidden, weight)
    kept = torch.autograd.grad((ours * torch.linspace(0.5, 2.0, T)).sum(), (hidden, weight), retain_graph=True)
    computed_again = gradients(ours, hidden, weight)  # the first backward has used up what was kept
    for mine in (kept, computed_again):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_a_piece_left_out_is_seen(monkeypatch):
    """The deliberately wrong variant: the last piece of several is never worked through."""
    pieces = cross_entropy._Shard.pieces
    monkeypatch.setattr(cross_entropy._Shard, "pieces", lambda *args: pieces(*args)[:-1])
    hidden, weight, labels = case()
    wrong = linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None, chunk_tokens=5)
    twin = reference.linear_cross_entropy(hidden, weight, labels, vocab_size=V)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, twin, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(wrong, weight), gradients(twin, weight), rtol=1e-5, atol=1e-6)


def test_only_trained_rows_are_projected_and_few_of_them_twice():
    hidden, weight, labels = case()
    num_trained = int((labels != -100).sum())
    assert num_trained < T

    class Projections(torch.utils._python_dispatch.TorchDispatchMode):
        """Rows that were multiplied into logits."""

        num_rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and out.shape[1] == V:
                self.num_rows += out.shape[0]
            return out

    with Projections() as forward:
        loss = linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None, chunk_tokens=4).sum()
    with Projections() as backward:
        loss.backward()
    assert forward.num_rows == num_trained == 18
    assert backward.num_rows == 16  # the last piece's log-probabilities were kept: 18 = 4 * 4 + 2


def test_nothing_trained():
    hidden, weight, labels = case()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, -100), vocab_size=V, group=None)
    assert not loss.any()
    assert not any(gradient.any() for gradient in gradients(loss, hidden, weight))


def test_large_logits_do_not_overflow():
    hidden, weight, labels = case()
    ours = linear_cross_entropy(100 * hidden, weight, labels, vocab_size=V, group=None)
    torch.testing.assert_close(ours, reference.linear_cross_entropy(100 * hidden, weight, labels, vocab_size=V))


def test_a_label_outside_the_vocabulary_is_loud():
    hidden, weight, labels = case()
    for wrong in (V, PADDED, -1, -200):
        labels[1] = wrong
        loss = linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None)
        assert loss[1].isnan() and not loss[2:].isnan().any()
        by_hidden, by_weight = torch.autograd.grad(loss.sum(), [hidden, weight])
        assert by_hidden[1].isnan().all() and not by_hidden[2:].isnan().any() and by_weight[:V].isnan().all()


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, labels = case()
    loss = linear_cross_entropy(hidden, weight.detach(), labels, vocab_size=V, group=None)
    expected = gradients(reference.linear_cross_entropy(hidden, weight, labels, vocab_size=V), hidden)
    torch.testing.assert_close(gradients(loss, hidden), expected, rtol=1e-5, atol=1e-6)


def test_bf16_is_within_its_own_rounding_of_fp32():
    hidden, weight, labels = case()
    exact = reference.linear_cross_entropy(hidden, weight, labels, vocab_size=V)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    loss = linear_cross_entropy(*rounded, labels, vocab_size=V, group=None, chunk_tokens=4)
    assert loss.dtype == torch.float32 and (loss - exact).norm() < 0.02 * exact.norm()
    for ours, theirs in zip(gradients(loss, *rounded), gradients(exact, hidden, weight), strict=True):
        assert ours.dtype == torch.bfloat16 and (ours.float() - theirs).norm() < 0.02 * theirs.norm()


def test_logits_are_never_whole():
    """The largest tensor the forward and backward make is a chunk's."""
    hidden, weight, labels = case()
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Sizes():
        linear_cross_entropy(hidden, weight, labels, vocab_size=V, group=None, chunk_tokens=2).sum().backward()
    assert largest == PADDED * H < T * V
