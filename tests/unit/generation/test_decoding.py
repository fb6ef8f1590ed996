"""Decoding with the cache: against a forward without one, alone and in a batch, and against transformers."""

from dataclasses import replace

import pytest
import torch

from megatron_vlm.errors import ConfigError
from tests.unit.generation.questions import NUM_NEW, batch_of, decode


def test_equals_a_full_forward_without_cache_token_by_token(pair, prompts):
    from megatron_vlm.generation.decoding import encode_images

    answers = decode(pair, batch_of(pair, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = batch_of(pair, [prompt])
        assert alone.valid.all()
        ids = alone.ids
        with torch.no_grad():
            features = encode_images(pair.ours.model, alone)
            for token in answer:
                positions = torch.arange(ids.shape[1])[None]
                logits = pair.ours.model.language[0](ids, positions, features=features)
                assert int(logits[0, -1].argmax()) == token
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert len({tuple(answer) for answer in answers}) == len(prompts), "the prompts must lead to different answers"


def test_a_batch_equals_its_prompts_alone_and_needs_its_mask(pair, prompts):
    batch = batch_of(pair, prompts)
    alone = [decode(pair, batch_of(pair, [prompt]))[0] for prompt in prompts]
    assert decode(pair, batch) == alone
    assert decode(pair, replace(batch, valid=torch.ones_like(batch.valid))) != alone  # padding seen: wrong
    shifted = replace(batch, images=batch.images[-1:] + batch.images[:-1])
    assert decode(pair, shifted) != alone  # another prompt's images: wrong


def test_equals_transformers_generate(pair, prompts):
    batch = batch_of(pair, prompts)
    ours = decode(pair, batch)
    pair.theirs.generation_config.eos_token_id = None
    start = 0
    for row, prompt in enumerate(prompts):
        num_images = sum(not isinstance(part, str) for part in prompt)
        images = [image() for image in batch.images[start : start + num_images]]
        pixels = {"pixel_values": torch.stack(images)} if images else {}
        start += num_images
        ids = batch.ids[row, batch.valid[row]][None]
        mask = torch.ones_like(ids)
        with torch.no_grad():
            theirs = pair.theirs.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0, **pixels
            )
        assert theirs[0, ids.shape[1] :].tolist() == ours[row]


def test_each_row_ends_at_its_own_stop_token(pair, prompts):
    batch = batch_of(pair, prompts)
    free = decode(pair, batch)
    stops = (free[0][2], free[1][5])
    expected = [row[: min([i for i, token in enumerate(row) if token in stops], default=len(row))] for row in free]
    assert decode(pair, batch, stops) == expected
    assert {len(row) for row in expected} != {NUM_NEW}


def test_stops_computing_when_every_row_has_ended(pair, prompts, monkeypatch):
    from megatron_vlm.generation.replica import Replica

    batch = batch_of(pair, prompts[:2])
    free = decode(pair, batch)
    calls: list[int] = []
    step = Replica.next_tokens
    monkeypatch.setattr(Replica, "next_tokens", lambda *given: calls.append(1) or step(*given))
    decode(pair, batch, stop_ids=(free[0][0], free[1][0]))
    assert len(calls) == 1


@pytest.mark.parametrize("num_new", [0, 1])
def test_short_limits(pair, prompts, num_new):
    assert [len(row) for row in decode(pair, batch_of(pair, prompts), num_new=num_new)] == [num_new] * len(prompts)


def test_a_named_attention_backend_waits_until_all_is_decoded(pair, prompts, monkeypatch):
    """cuDNN takes no single query and no hidden keys; on the CPU it takes nothing, so whoever asks it is seen."""
    from megatron_vlm.generation.replica import decoding
    from megatron_vlm.generation.scoring import score

    model, batch = pair.ours.model, batch_of(pair, prompts)
    labelled = replace(batch, labels=batch.ids)
    answers, scores = decode(pair, batch), score(model, labelled)
    cores = [layer.self_attention.core_attention for layer in model.language[0].decoder.layers]
    for core in cores:
        monkeypatch.setattr(core, "backend", "cudnn")
    with pytest.raises(ConfigError, match="cudnn"):
        model.language[0](batch.ids, batch.position_ids)
    assert decode(pair, batch) == answers and score(model, labelled) == scores
    with pytest.raises(InterruptedError), decoding(model):
        assert {core.backend for core in cores} == {"auto"}
        raise InterruptedError
    assert [core.backend for core in cores] == ["cudnn"] * len(cores) != []
