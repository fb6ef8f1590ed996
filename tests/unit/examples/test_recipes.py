"""Every recipe that is shipped, or that benchmarks run, is valid for the number of ranks it is meant for."""

from pathlib import Path

import pytest

from megatron_vlm.config import load_config
from megatron_vlm.config.rules import unused_keys, validate
from megatron_vlm.config.schema import Config
from megatron_vlm.data.text.conversation import TEMPLATES
from megatron_vlm.evaluation.tasks import TASKS
from megatron_vlm.models.facts import gather_facts
from tests.helpers.models.public_models import CLIP_B_32, CLIP_L_336, QWEN2_7B, QWEN2_7B_INSTRUCT
from tests.helpers.ranks.processes import ROOT

RECIPES = ROOT / "examples" / "recipes"
OF_BENCHMARKS = ROOT / "tools" / "benchmarks" / "recipes"
SHIPPED = sorted([*RECIPES.glob("*.yaml"), *OF_BENCHMARKS.glob("*.yaml")])
RANKS = {
    "quickstart": 4,
    "from_scratch": 1,
    "llama3_8b_fp8": 8,
    "llava15_7b_8gpu": 8,
    "llava_qwen2_7b": 8,
    "long_video_qwen2_7b": 8,
    "bench_cpu": 2,
    "bench_cpu_large": 2,
    "bench_gpu_step": 1,
    "bench_packing": 1,
}
PUBLIC = {
    "Qwen/Qwen2-7B": QWEN2_7B,
    "Qwen/Qwen2-7B-Instruct": QWEN2_7B_INSTRUCT,
    "openai/clip-vit-base-patch32": CLIP_B_32,
    "openai/clip-vit-large-patch14-336": CLIP_L_336,
}


def without_downloads(config: Config) -> Config:
    """The recipe with the public models' sizes in the place of their hub ids."""
    language, vision = config.model.language, config.model.vision
    if language.path is not None:
        sizes = {"path": None, "config": PUBLIC[language.path], "tokenizer": language.path}
        language = language.model_copy(update=sizes)
    if vision.path is not None:
        vision = vision.model_copy(update={"path": None, "config": PUBLIC[vision.path]})
    return config.model_copy(update={"model": config.model.model_copy(update={"language": language, "vision": vision})})


@pytest.mark.parametrize(
    "path", sorted([*RECIPES.glob("*.yaml"), *OF_BENCHMARKS.glob("*.yaml")]), ids=lambda path: path.stem
)
def test_recipe(path: Path) -> None:
    config = without_downloads(load_config(path))
    world_size = RANKS[path.stem.partition("_phase")[0]]
    facts = gather_facts(config, TEMPLATES.names(), TASKS.names())
    validate(config, facts, world_size)
    assert config.parallel.context is None and unused_keys(config, facts, world_size) == []
    assert facts.context_tokens is not None and config.training.sequence_length <= facts.context_tokens


def test_a_wrong_number_of_ranks_is_found() -> None:
    config = without_downloads(load_config(RECIPES / "llava_qwen2_7b_phase1.yaml"))
    with pytest.raises(ValueError, match="parallel.tensor"):
        validate(config, gather_facts(config, TEMPLATES.names(), TASKS.names()), 6)


def test_the_longest_video_fits_its_rows() -> None:
    config = without_downloads(load_config(RECIPES / "long_video_qwen2_7b.yaml"))
    tokens_per_frame = gather_facts(config, TEMPLATES.names(), TASKS.names()).tokens_per_image
    with_line_breaks = config.data.video.num_frames * (tokens_per_frame + 1)
    assert tokens_per_frame == 49 and config.data.video.num_frames == 2048
    assert with_line_breaks + 1000 <= config.training.sequence_length <= with_line_breaks + 4000


def test_the_benchmarks_whole_step_is_of_the_size_it_names() -> None:
    """8 images of 196 tokens in a row of 8,192; 8 billion parameters, of which tower and projector train."""
    config = load_config(OF_BENCHMARKS / "bench_gpu_step.yaml")
    facts = gather_facts(config, TEMPLATES.names(), TASKS.names())
    assert facts.tokens_per_image == 196 and 8 * 196 < config.training.sequence_length == 8192
    in_fp8 = load_config(OF_BENCHMARKS / "bench_gpu_step.yaml", ["precision.fp8=tensorwise"])
    validate(in_fp8, gather_facts(in_fp8, TEMPLATES.names(), TASKS.names()), 1)
    assert not config.model.train.language and config.model.train.vision and config.model.train.projector
