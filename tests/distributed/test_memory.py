"""What the model needs on each rank: as worked out by hand, and shared out by tensor and pipeline ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config.schema import Config
from megatron_vlm.training.job import build_job
from megatron_vlm.training.reporting import memory
from megatron_vlm.training.reporting.memory import KINDS, model_memory, process_memory
from tests.helpers.models.tiny import tiny_llama, tiny_recipe
from tests.helpers.ranks.pool import RankPool

LAYERS_DOMINATE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 8}


def recipe(directory: Path, **sections: Any) -> dict[str, Any]:
    """A job whose language model is, as real ones are, mostly layers."""
    language = {"config": {**tiny_llama(331), **LAYERS_DOMINATE}}
    model = {"language": language, **sections.pop("model", {})}
    return tiny_recipe(directory, model=model, **sections).model_dump(mode="json")


def measured(recipe: dict[str, Any]) -> dict[str, Any]:
    """Bytes by component and kind after one update, the parameters' numbers, and what a plain sum would give."""
    job = build_job(Config.model_validate(recipe), torch.distributed.get_world_size())
    for batch in job.batches(1):
        job.step(batch)
    tensors = [
        tensor
        for component in ("language", "vision")
        for holder in (memory._parameters, memory._gradients, memory._optimizer_state)
        for tensor in holder(job, component)
    ]
    return {
        "bytes": model_memory(job),
        "language": sum(p.numel() for chunk in job.language for p in chunk.parameters()),
        "vision": sum(p.numel() for p in job.vision.parameters()),
        "vision trained": sum(p.numel() for p in job.vision.parameters() if p.requires_grad),
        "plain sum": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }


def test_fp32_on_one_rank_by_hand(ranks: RankPool, tmp_path: Path) -> None:
    """Parameters and gradients 4 bytes each, two moments; the tower's frozen layers have their parameters only."""
    for distributed in (False, True):
        (found,) = ranks.run(1, measured, recipe(tmp_path, optimizer={"distributed": distributed}))
        language, vision, trained = found["language"], found["vision"], found["vision trained"]
        assert trained < vision
        wanted = {"parameters": 4 * language, "gradients": 4 * language, "optimizer state": 8 * language}
        assert found["bytes"]["language"] == pytest.approx(wanted, rel=2e-3)  # buffers are padded
        wanted = {"parameters": 4 * vision, "gradients": 4 * trained, "optimizer state": 8 * trained}
        assert found["bytes"]["vision"] == pytest.approx(wanted, rel=2e-2)
        total = sum(sum(kinds.values()) for kinds in found["bytes"].values())
        assert found["plain sum"] > 1.2 * total, "main parameters are parameters: a plain sum counts them twice"


def test_bf16_shards_over_data_parallel_ranks_by_hand(ranks: RankPool, tmp_path: Path) -> None:
    """bf16 parameters 2 bytes, fp32 gradients 4; fp32 main parameters and moments 12, half of them on each rank."""
    sections = {"optimizer": {"distributed": True}, "precision": {"params": "bf16"}}
    for found in ranks.run(2, measured, recipe(tmp_path, **sections)):
        number = found["language"]
        wanted = {"parameters": 2 * number, "gradients": 4 * number, "optimizer state": 6 * number}
        assert found["bytes"]["language"] == pytest.approx(wanted, rel=5e-3)


def test_tensor_and_pipeline_ranks_share_the_language_model(ranks: RankPool, tmp_path: Path) -> None:
    """At most 60% of one process's on each of two ranks, in every kind. Printed with -s."""
    layouts = {
        "one process": ranks.run(1, measured, recipe(tmp_path)),
        "tp2": ranks.run(2, measured, recipe(tmp_path, parallel={"tensor": 2})),
        "tp2 + sequence": ranks.run(2, measured, recipe(tmp_path, parallel={"tensor": 2, "sequence": True})),
        "pp2": ranks.run(2, measured, recipe(tmp_path, parallel={"pipeline": 2})),
    }
    whole = layouts["one process"][0]["bytes"]["language"]
    print(f"\nlanguage model, bytes per rank  {'  '.join(f'{kind:>15}' for kind in KINDS)}            sum   share")
    for layout, found in layouts.items():
        for rank, one in enumerate(found):
            own = one["bytes"]["language"]
            share = sum(own.values()) / sum(whole.values())
            columns = "  ".join(f"{own[kind]:>15,}" for kind in KINDS)
            print(f"{layout:>16}, rank {rank}         {columns}  {sum(own.values()):>13,}  {share:>5.1%}")
            assert layout == "one process" or share <= 0.6
            assert layout == "one process" or all(own[kind] <= 0.6 * whole[kind] for kind in KINDS)


def resident_after(num_bytes: int) -> tuple[int, int, int]:
    """This process's memory before, with and after a tensor of that size."""
    before = process_memory().current_bytes
    held = torch.ones(num_bytes, dtype=torch.uint8)
    during = process_memory()
    del held
    return during.current_bytes - before, during.peak_bytes - before, process_memory().peak_bytes - before


def test_the_process_is_measured_in_bytes(ranks: RankPool) -> None:
    size = 300 * 2**20
    ((current, peak, peak_afterwards),) = ranks.run(1, resident_after, size)
    assert 0.95 * size < current < 1.2 * size and peak >= 0.95 * size and peak_afterwards >= peak
