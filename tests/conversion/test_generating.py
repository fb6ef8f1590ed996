"""A model that learnt where its answers end gives them, and ends them, alike: from its checkpoint, from its export, and
in transformers' own classes and pipeline."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import megatron_vlm
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.helpers.data.chat_tokenizers import CHATML, LLAMA_3, of_bytes
from tests.helpers.models.tiny import tiny_llama, tiny_recipe

pytestmark = pytest.mark.slow
ANSWERS = {"red": "Red it is.", "blue": "Blue!"}
MAX_NEW_TOKENS = 40
CASES = {  # template, the tokenizer's own one, its end of sequence, what ends the answers that are trained
    "auto": ("auto", CHATML, "<|endoftext|>", "<|im_end|>"),
    "llama_3": ("llama_3", CHATML, "</s>", "<|end_of_text|>"),
    "vicuna_v1": ("vicuna_v1", None, "<|endoftext|>", "</s>"),
}


@pytest.fixture(autouse=True)
def no_world_left() -> Iterator[None]:
    yield
    from megatron_vlm.runtime.distributed import teardown

    teardown()


def train(folder: Path, template: str, program: str | None, eos: str) -> Path:
    """A model that knows the two images' answers by heart; returns its checkpoint."""
    from megatron_vlm.runtime.device import prepare
    from megatron_vlm.runtime.distributed import Launch, init_world, teardown
    from megatron_vlm.training.loop import train as run

    tokenizer = of_bytes(folder / "chat", program, bos=LLAMA_3[0], eos=eos)
    records = []
    for colour, answer in ANSWERS.items():
        image(colour).save(folder / f"{colour}.png")
        talk = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": answer}]
        records.append({"image": f"{colour}.png", "conversations": talk})
    (folder / "talks.json").write_text(json.dumps(records))
    language = {"config": tiny_llama(300), "tokenizer": str(tokenizer)}
    recipe = tiny_recipe(
        folder,
        model={"language": language},
        data={"path": str(folder / "talks.json"), "template": template},
        training={"sequence_length": 384, "global_batch_size": 2, "steps": 80},
        optimizer={"lr": 4e-3},
        checkpoint={"async_save": False},
    )
    try:
        init_world(Launch(), prepare("cpu"), 60)
        run(recipe, Launch())
    finally:
        teardown()
    return Path(recipe.checkpoint.directory) / "step_0000080"


def image(colour: str) -> Image.Image:
    """Not square, so that the image mode counts."""
    pixels = np.random.default_rng(3).integers(0, 60, (20, 34, 3), dtype=np.uint8)
    return Image.blend(Image.fromarray(pixels), Image.new("RGB", (34, 20), colour), 0.8)


def answers_here(path: Path) -> dict[str, str]:
    assistant: Any = megatron_vlm.load(str(path), device="cpu")
    prompts = [[image(colour), "Colour?"] for colour in ANSWERS]
    return dict(zip(ANSWERS, assistant.generate(prompts, max_new_tokens=MAX_NEW_TOKENS), strict=True))


def chat(colour: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image(colour)}, {"type": "text", "text": "Colour?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("case", CASES)
def test_answers_are_given_and_end_alike(tmp_path, case):
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    template, program, eos, end = CASES[case]
    checkpoint = train(tmp_path, template, program, eos)
    assert answers_here(checkpoint) == ANSWERS
    plan_export(checkpoint).write(tmp_path / "out")
    assert answers_here(tmp_path / "out") == ANSWERS
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    stop = processor.tokenizer.convert_tokens_to_ids(end)
    assert stop != processor.tokenizer.eos_token_id
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    for colour, answer in ANSWERS.items():
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(chat(colour), **options)
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert ids[-1] == stop and len(ids) < MAX_NEW_TOKENS
        assert processor.decode(ids, skip_special_tokens=True).strip() == answer
        said = ask(text=chat(colour), max_new_tokens=MAX_NEW_TOKENS, return_full_text=False, do_sample=False)
        assert said[0]["generated_text"].strip() == answer


def test_ends_that_generation_config_alone_names_end_answers_and_are_kept(tmp_path):
    """As of Llama-3-Instruct, whose config.json names one of several."""
    from megatron_vlm.conversion.formats import open_foreign
    from megatron_vlm.conversion.transfer.importing import import_model

    template, program, eos, end = CASES["auto"]
    theirs = tmp_path / "theirs"
    plan_export(train(tmp_path, template, program, eos)).write(theirs)
    other = "<|eot_id|>"  # special, and no word of the template or the tokenizer's end
    assert answers_here(say_instead(theirs, end, other)) != ANSWERS  # it goes on, without an end that is known
    settings = theirs / "generation_config.json"
    ids = {token: load_tokenizer(theirs, "<image>").convert_tokens_to_ids(token) for token in (eos, end, other)}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": [ids[eos], ids[other]]}))
    assert answers_here(theirs) == ANSWERS
    import_model(open_foreign(theirs), tmp_path / "ours")
    assert answers_here(tmp_path / "ours") == ANSWERS
    for format in ("llava-hf", "llava"):
        plan_export(tmp_path / "ours", format).write(tmp_path / format)
        told = json.loads((tmp_path / format / "generation_config.json").read_text())["eos_token_id"]
        assert set(told) >= {ids[eos], ids[other]}
        assert answers_here(tmp_path / format) == ANSWERS


def say_instead(folder: Path, token: str, other: str) -> Path:
    """Makes a model say one token where it said another."""
    tokenizer, (file,) = load_tokenizer(folder, "<image>"), folder.glob("*.safetensors")
    state = load_file(file)
    (head,) = (name for name in state if name.endswith("lm_head.weight"))
    rows = [tokenizer.convert_tokens_to_ids(one) for one in (token, other)]
    state[head][rows] = state[head][rows[::-1]].clone()
    save_file(state, file, {"format": "pt"})
    return folder
