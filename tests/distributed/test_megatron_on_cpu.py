"""megatron-core itself over the CPU stand-in: every part of it that the package uses runs, and computes the same.

A plain GPTModel, no code of ours but `runtime.device` and `build_grid`. Layouts are compared by the losses of three
updates, from weights that every layout loads from one checkpoint.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.parallel.sizes import GridSizes
from tests.helpers.lanes import mostly_slow
from tests.helpers.ranks.pool import RankPool

LAYERS, HIDDEN, VOCABULARY, LENGTH, MICRO_BATCHES, UPDATES = 4, 16, 64, 8, 4, 3


def transformer_config(sizes: GridSizes, **extra: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    arguments = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "pipeline_dtype": torch.float32,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "calculate_per_token_loss": True,
        **extra,
    }
    return TransformerConfig(**arguments)


def build_chunks(config: Any, virtual: int) -> list[torch.nn.Module]:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    chunks = []
    for number in range(virtual):
        stage = {"vp_stage": number, "ignore_virtual": False} if virtual > 1 else {}
        chunks.append(
            GPTModel(
                config,
                get_gpt_layer_local_spec(),
                VOCABULARY,
                LENGTH,
                pre_process=parallel_state.is_pipeline_first_stage(**stage),
                post_process=parallel_state.is_pipeline_last_stage(**stage),
                share_embeddings_and_output_weights=False,
                position_embedding_type="rope",
                vp_stage=number if virtual > 1 else None,
            )
        )
    return chunks


def wrap(config: Any, chunks: list[torch.nn.Module], distributed: bool, overlap: bool) -> tuple[list, Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed,
        bucket_size=1000 if overlap else None,
    )
    model = [DistributedDataParallel(config, ddp_config, c, disable_bucketing=i > 0) for i, c in enumerate(chunks)]
    if overlap:
        config.no_sync_func = [m.no_sync for m in model] if len(model) > 1 else model[0].no_sync
    config.finalize_model_grads_func = finalize_model_grads
    optimizer_config = OptimizerConfig(lr=1e-2, clip_grad=1.0, use_distributed_optimizer=distributed)
    return model, get_megatron_optimizer(optimizer_config, model, use_gloo_process_groups=False)


def micro_batches(data_rank: int, data_size: int) -> list[torch.Tensor]:
    """This data rank's share of the one global batch: [1, LENGTH + 1] each."""
    generator = torch.Generator().manual_seed(3)
    everything = torch.randint(0, VOCABULARY, (MICRO_BATCHES, 1, LENGTH + 1), generator=generator)
    return list(everything[data_rank::data_size])


def forward_step(iterator: Any, model: torch.nn.Module) -> Any:
    batch = next(iterator)
    positions = torch.arange(LENGTH)[None]
    output = model(batch[:, :-1], positions, None, labels=batch[:, 1:])

    def loss(per_token: torch.Tensor) -> Any:
        return per_token.sum(), torch.tensor(per_token.numel(), dtype=torch.int), {"sum": per_token.sum().detach()}

    return output, loss


def train(
    sizes: GridSizes, directory: Path, virtual: int = 1, distributed: bool = False, overlap: bool = False, **extra: Any
) -> list[float]:
    """Three updates from the checkpoint in `directory`, which one process writes if there is none."""
    from megatron.core import dist_checkpointing
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_vlm.parallel.groups import build_grid
    from megatron_vlm.runtime.device import use_adam
    from megatron_vlm.runtime.seeding import seed_everything
    from megatron_vlm.training.adamw import AdamW

    grid = build_grid(sizes, virtual)
    seed_everything(1, grid)
    use_adam(AdamW)
    if virtual > 1:
        extra |= {"virtual_pipeline_model_parallel_size": virtual, "overlap_p2p_comm": True, "batch_p2p_comm": False}
    config = transformer_config(sizes, **extra)
    chunks = build_chunks(config, virtual)
    sharded = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
    if not directory.exists():
        directory.mkdir()
        dist_checkpointing.save(sharded, str(directory))
    loaded = dist_checkpointing.load(sharded, str(directory))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
    model, optimizer = wrap(config, chunks, distributed, overlap)
    sums = []
    batches = micro_batches(grid.coordinates.data, sizes.data)
    for _ in range(UPDATES):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in model] if virtual > 1 else iter(batches),
            model=model,
            num_microbatches=len(batches),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        assert optimizer.step()[0]
        total = sum((report["sum"] for report in reports), torch.zeros(()))
        dist.all_reduce(total)
        sums.append(total.item() / sizes.tensor)
    check_optimizer_checkpoint(model, optimizer, directory.parent / f"{directory.name}_optimizer", grid)
    return sums


def check_optimizer_checkpoint(model: list, optimizer: Any, directory: Path, grid: Any) -> None:
    """Saves the optimizer, spoils its moments, loads, and finds them again (where there are many buckets too)."""
    from megatron.core import dist_checkpointing

    from megatron_vlm.checkpoint.optimizer_state import load_optimizer_state, sharded_optimizer_state

    def sharded(is_loading: bool) -> Any:
        keys = {"non_homogeneous_layers": True}  # one per layer, as checkpoint/store.py has it
        chunks = {f"model{i}": chunk.module.sharded_state_dict(metadata=dict(keys)) for i, chunk in enumerate(model)}
        return {"optimizer": sharded_optimizer_state(optimizer, chunks, is_loading)}

    def moments() -> dict[Any, torch.Tensor]:
        return {p: s["exp_avg"] for o in optimizer.chained_optimizers for p, s in o.optimizer.state.items()}

    if grid.rank == 0:
        directory.mkdir(exist_ok=True)
    dist.barrier()
    before = {parameter: moment.clone() for parameter, moment in moments().items()}
    assert any(moment.any() for moment in before.values())
    dist_checkpointing.save(sharded(False), str(directory))
    for moment in moments().values():
        moment.zero_()
    load_optimizer_state(optimizer, dist_checkpointing.load(sharded(True), str(directory))["optimizer"])
    after = moments()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[parameter], after[parameter]) for parameter in before)


@pytest.fixture(scope="module")
def reference(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """One process: its checkpoint, and its losses."""
    directory = tmp_path_factory.mktemp("megatron") / "checkpoint"
    return directory, ranks.run(1, train, GridSizes(), directory)[0]


LAYOUTS = {
    "tp2": (GridSizes(tensor=2), {}),
    "dp2, distributed optimizer, overlap": (GridSizes(data=2), {"distributed": True, "overlap": True}),
    "pp2, full recompute": (
        GridSizes(pipeline=2),
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "pp2 in two virtual stages": (GridSizes(pipeline=2), {"virtual": 2}),
    "tp2 x pp2": (GridSizes(tensor=2, pipeline=2), {}),
}


def train_layout(sizes: GridSizes, directory: Path, options: dict[str, Any]) -> list[float]:
    return train(sizes, directory, **options)


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, ["pp2 in two virtual stages", "tp2 x pp2"]))
def test_losses_are_those_of_one_process(ranks: RankPool, reference: tuple[Path, list[float]], layout: str) -> None:
    directory, expected = reference
    sizes, options = LAYOUTS[layout]
    assert expected[0] > expected[1] > expected[2] > 0
    for losses in ranks.run(sizes.world, train_layout, sizes, directory, options):
        assert losses == pytest.approx(expected, rel=1e-5)


def gradients_with_dropout(recompute: bool) -> list[torch.Tensor]:
    from megatron_vlm.parallel.groups import build_grid
    from megatron_vlm.runtime.seeding import seed_everything

    seed_everything(1, build_grid(GridSizes(tensor=2)))
    extra = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = transformer_config(
        GridSizes(tensor=2), hidden_dropout=0.3, attention_dropout=0.3, **(extra if recompute else {})
    )
    (model,) = build_chunks(config, 1)
    batch = micro_batches(0, 1)[0]
    model(batch[:, :-1], torch.arange(LENGTH)[None], None, labels=batch[:, 1:]).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_recompute_draws_the_same_dropout_again(ranks: RankPool) -> None:
    """The generators' states are kept and restored through the stand-in; random masks show any slip."""
    plain, recomputed = (ranks.run(2, gradients_with_dropout, recompute) for recompute in (False, True))
    for rank in range(2):
        for one, other in zip(plain[rank], recomputed[rank], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
