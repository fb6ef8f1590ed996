"""Greedy tokens equal transformers.generate's, on 50 random prompts of 0 to 3 images, in every layout we claim.

Tiny random models with grouped queries in fp32, whose weights vary so much that the two likeliest tokens are apart by
far more than rounding: the least margin seen in the reference is asserted too.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.models.tiny import WORDS, tiny_recipe
from tests.helpers.ranks.pool import RankPool
from tests.unit.generation.conftest import hf_llava

pytestmark = pytest.mark.slow
NUM_PROMPTS, NUM_NEW, BATCH = 50, 12, 8
LEAST_MARGIN = 1e-4  # of logits, whose rounding differs between layouts by about 1e-5
LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2-ulysses2": (4, {"tensor": 2, "ulysses": 2}),
    "tp2-ring2": (4, {"tensor": 2, "ring": 2}),
}


def random_prompts() -> list[list[Any]]:
    """Images of any size anywhere among pieces of text."""
    random = np.random.default_rng(21)
    prompts = []
    for number in range(NUM_PROMPTS):
        parts: list[Any] = [" ".join(random.choice(WORDS, int(random.integers(1, 12))))]
        for _ in range(number % 4):
            height, width = random.integers(8, 50, 2)
            image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
            parts.insert(int(random.integers(len(parts) + 1)), image)
        prompts.append(parts)
    return prompts


def encoded_prompts(assistant: Any) -> list[Any]:
    """As questions."""
    from megatron_vlm.generation.prompts import Question, read_prompt

    questions = []
    for number, prompt in enumerate(random_prompts()):
        sample, images = read_prompt(prompt, assistant.image_token, number)
        questions.append(Question(sample, [partial(assistant.reader.prepare, image) for image in images]))
    return questions


def ours(recipe: dict[str, Any], with_inputs: bool) -> tuple[list[list[int]], list[Any]]:
    """Tokens per prompt as this rank sees them, and each prompt's ids and pixels."""
    from megatron_vlm.config.schema import Config
    from megatron_vlm.conversion.weights.loading import load_hf_state
    from megatron_vlm.generation.assistant import Assistant
    from megatron_vlm.generation.decoding import decode
    from megatron_vlm.generation.prompts import collate
    from megatron_vlm.generation.sampling import Sampler, Sampling
    from megatron_vlm.generation.stopping import Stopping
    from megatron_vlm.training.job import build_job

    config = Config.model_validate(recipe)
    job = build_job(config, torch.distributed.get_world_size())
    load_hf_state(job.model, hf_llava(config).state_dict(), job.grid)
    assistant = Assistant.of(job.model, config.data, job.tokenizer)
    questions = encoded_prompts(assistant)
    rows: list[list[int]] = []
    for start in range(0, len(questions), BATCH):
        batch = collate(questions[start : start + BATCH], assistant.encoder, job.model.media_spec)
        rows += decode(job.model, batch, Sampler(Sampling(), ()), Stopping(job.tokenizer, ()), NUM_NEW)
    inputs = []
    for question in questions if with_inputs else ():
        batch = collate([question], assistant.encoder, job.model.media_spec)
        inputs.append((batch.ids, [image() for image in batch.images]))
    return rows, inputs


@pytest.fixture(scope="module")
def expected(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """transformers' tokens, one prompt at a time."""
    config = tiny_recipe(tmp_path_factory.mktemp("reference"))
    ((_, inputs),) = ranks.run(1, ours, config.model_dump(mode="json"), True)
    theirs = hf_llava(config)
    theirs.generation_config.eos_token_id = None
    rows, margins = [], []
    for ids, images in inputs:
        pixels = {"pixel_values": torch.stack(images)} if images else {}
        with torch.no_grad():
            found = theirs.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_NEW,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
                **pixels,
            )
        rows.append(found.sequences[0, ids.shape[1] :].tolist())
        first, second = torch.cat(found.logits).topk(2).values.T
        margins.append(float((first - second).min()))
    assert len({tuple(row) for row in rows}) == NUM_PROMPTS, "the prompts must lead to different answers"
    assert min(margins) > LEAST_MARGIN, f"a choice is too close to call: {min(margins)}"
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_equal_transformers(ranks, expected, tmp_path, layout):
    num_ranks, parallel = LAYOUTS[layout]
    recipe = tiny_recipe(tmp_path, parallel=parallel).model_dump(mode="json")
    for rows, _ in ranks.run(num_ranks, ours, recipe, False, timeout=280):
        assert rows == expected
