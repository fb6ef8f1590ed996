"""One small assistant beside transformers' LlavaForConditionalGeneration, both with the same weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers.models.tiny import tiny_recipe
from tests.helpers.ranks.solo import one_rank

PLACEHOLDER = 0  # the tiny tokenizer's <pad>, which no text holds: also transformers' image token here


@dataclass(frozen=True)
class Pair:
    """Our assistant and transformers' model."""

    ours: Any
    theirs: torch.nn.Module
    config: Any


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    config = tiny_recipe(tmp_path_factory.mktemp("tiny"))
    with one_rank() as grid:
        yield make_pair(config, grid)


def make_pair(config: Any, grid: Any) -> Pair:
    """Both models from one state dict."""
    from megatron_vlm.conversion.weights.loading import load_hf_state
    from megatron_vlm.data.text.conversation import ConversationEncoder
    from megatron_vlm.data.text.tokenizer import load_tokenizer
    from megatron_vlm.generation.assistant import Assistant
    from megatron_vlm.models.architectures import load_language_config
    from megatron_vlm.models.description import describe_model
    from megatron_vlm.models.families import build_model

    theirs = hf_llava(config)
    model = build_model(config, describe_model(config.model), grid)
    load_hf_state(model, theirs.state_dict(), grid)
    image_token = config.data.image_token
    tokenizer = load_tokenizer(config.model.language.tokenizer, image_token)
    encoder = ConversationEncoder(tokenizer, config.data.template, image_token, model.media_spec.tokens_per_image)
    stops = load_language_config(config.model.language).eos_token_id
    return Pair(Assistant(model, encoder, config.data, stops), theirs, config)


def hf_llava(config: Any) -> torch.nn.Module:
    """The recipe's architecture in transformers, with weights under which every token's choice is clear."""
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    hf_config = LlavaConfig(
        vision_config=AutoConfig.for_model(**config.model.vision.config),
        text_config=AutoConfig.for_model(**config.model.language.config),
        image_token_index=PLACEHOLDER,
        vision_feature_layer=config.model.vision.select_layer,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(hf_config).float().train(False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = 0.2 * noise + float("norm" in name and name.endswith("weight"))
        else:
            parameter.data = noise * 1.5 / parameter[0].numel() ** 0.5
    return model


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return draw_images()


@pytest.fixture(scope="module")
def prompts(images: list[Image.Image]) -> list[list[Any]]:
    return write_prompts(images)


def draw_images() -> list[Image.Image]:
    """Three images of different sizes and colours."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(28, 28), (40, 20), (13, 31)]  # width, height
    return [
        Image.fromarray(torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())
        for width, height in sizes
    ]


def write_prompts(images: list[Image.Image]) -> list[list[Any]]:
    """No, one and several images, so that lengths differ by much."""
    return [
        ["how many small red circle?"],
        [images[0], "What is this?"],
        [*images, "which picture shows far green square near blue?"],
        [images[2], "far"],
    ]
