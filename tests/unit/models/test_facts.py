"""Facts for validation, against the recipe and a real model."""

import pytest
import torch

from megatron_vlm.config.rules import validate
from megatron_vlm.config.schema import Config, LanguageConfig
from megatron_vlm.errors import ConfigError
from megatron_vlm.models.architectures import context_tokens, load_language_config
from megatron_vlm.models.facts import gather_facts
from tests.helpers.ranks.pool import RankPool
from tests.unit.models.recipes import SMALL_LLAMA, SMALL_TOWER, small_recipe

TEMPLATES, TASKS = ("auto",), ("exact_match",)
QWEN2 = {**SMALL_LLAMA, "model_type": "qwen2"}
PHI3 = {**SMALL_LLAMA, "model_type": "phi3", "pad_token_id": None}


def test_numbers() -> None:
    facts = gather_facts(small_recipe(), TEMPLATES, TASKS)
    assert (facts.num_layers, facts.hidden_size, facts.ffn_hidden_size, facts.vocab_size) == (2, 64, 96, 101)
    assert (facts.num_attention_heads, facts.num_query_groups) == (4, 2)
    assert (facts.vision_num_layers, facts.tokens_per_image) == (4, 16)
    assert facts.templates == TEMPLATES and facts.tasks == TASKS
    assert "llava" in facts.families and "mlp2x_gelu" in facts.projectors
    assert {"psutil", "einops"} <= facts.installed


def test_faults_of_the_recipe_are_left_to_validation() -> None:
    vision = {"config": {"model_type": "clip_vision_model", **SMALL_TOWER}, "select_layer": -9}
    language = {"config": SMALL_LLAMA, "tokenizer": "unused"}
    config = small_recipe(vision=vision, language=language, projector={"type": "mlp2x_gelo"}, family="lava")
    with pytest.raises(ConfigError) as raised:
        validate(config, gather_facts(config, TEMPLATES, TASKS), world_size=1)
    for fault in ("select_layer: found -9", "projector.type: found 'mlp2x_gelo'", "family: found 'lava'"):
        assert fault in str(raised.value)


def test_backends_are_asked_where_the_device_is_known() -> None:
    """A recipe is looked at on machines of every kind, which is not where it runs."""

    def told(device: str | None, fp8: str | None = None, **ops: str) -> tuple[str, ...]:
        tree = small_recipe(projector={"type": "linear"}).model_dump()
        config = Config.model_validate({**tree, "ops": ops, "precision": {"params": "fp32", "fp8": fp8}})
        return gather_facts(
            config, TEMPLATES, TASKS, None if device is None else torch.device(device)
        ).backend_obstacles

    projector, attention = told("cpu", attention="cudnn", projector="triton")
    assert projector.startswith("ops.projector: found 'triton' with model.projector.type 'linear', which has no operat")
    assert attention.startswith("ops.attention: 'cudnn' cannot run: it needs tensors on a CUDA device, found cpu")
    assert told(None, attention="cudnn") == ()
    (dtype,) = told("cuda", attention="cudnn")
    assert "it needs torch.bfloat16 or torch.float16, found torch.float32" in dtype
    assert told("cuda", fp8_quantise="triton") == ()  # without FP8 nothing is quantised
    (quantise,) = told("cuda", "tensorwise", fp8_quantise="triton")  # here kernels are interpreted, on the CPU
    assert quantise.startswith("ops.fp8_quantise: 'triton' cannot run: ")


@pytest.mark.parametrize("language", [SMALL_LLAMA, {**SMALL_LLAMA, "tie_word_embeddings": True}, QWEN2, PHI3])
def test_parameter_names_are_those_of_the_real_model(language: dict, ranks: RankPool) -> None:
    config = small_recipe(language={"config": language})
    facts = gather_facts(config, TEMPLATES, TASKS)
    (real,) = ranks.run(1, names_of_built_model, config)
    expected = {name for names in facts.parameter_names.values() for name in names}
    assert real["all"] - real["unused"] == expected
    assert all(name.startswith("vision.") for name in real["unused"])


def names_of_built_model(config: Config) -> dict[str, set[str]]:
    """Runs in a rank: global names of all parameters and of the tower's unreached ones."""
    from megatron_vlm.models.description import describe_model
    from megatron_vlm.models.families import build_model
    from megatron_vlm.parallel.groups import GridSizes, build_grid
    from megatron_vlm.runtime.seeding import seed_everything

    grid = build_grid(GridSizes.from_config(config.parallel, 1), config.parallel.virtual_pipeline)
    seed_everything(0, grid)
    model = build_model(config, describe_model(config.model), grid)
    unused = {f"vision.{name}" for name in model.vision.tower.survey.unreached}
    return {"all": {name for name, _ in model.named_parameters()}, "unused": unused}


@pytest.mark.parametrize(
    ("rope", "known"), [(None, 64), ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 256)]
)
def test_positions_that_the_model_knows_are_stretched_with_linear_rope(rope, known):
    changes = {"max_position_embeddings": 64} | ({} if rope is None else {"rope_parameters": rope})
    assert context_tokens(load_language_config(LanguageConfig(config=SMALL_LLAMA | changes))) == known
