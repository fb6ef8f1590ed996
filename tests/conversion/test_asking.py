"""An export is asked as the model was trained: by transformers, and by our own reading of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.config.loading import config_from_tree
from megatron_vlm.conversion.formats import open_foreign
from megatron_vlm.conversion.formats.recipe import config_of
from megatron_vlm.conversion.transfer.asking import Asking
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.conversion.transfer.importing import import_model
from megatron_vlm.data.sample import Sample
from megatron_vlm.data.text.answer_ends import find_stop_ids
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.helpers.data.chat_tokenizers import CHATML, CLOCKED, INSTRUCT, LLAMA_3, TYPED_CHATML, of_bytes, of_pieces
from tests.helpers.models.chat_checkpoints import (
    TOKENS_PER_IMAGE,
    check_tokens,
    checkpoint_of,
    conversations,
)
from tests.helpers.models.foreign_models import llava_hf

ARGUMENTS = {"arguments and a date": {"style": ["short", None], "strftime_now": "2026-03-05"}}  # of `CLOCKED`
KINDS: dict[str, tuple[str, Callable[[Path], Path]]] = {  # template, tokenizer
    "arguments and a date": ("auto", lambda f: of_bytes(f, CLOCKED, eos="<|endoftext|>")),
    "ChatML": ("auto", lambda f: of_bytes(f, CHATML, eos="<|endoftext|>")),
    "ChatML, and the tokenizer adds a beginning": ("auto", lambda f: of_bytes(f, CHATML, "<s>", adds="<s> $A </s>")),
    "the tokenizer names another image token": ("auto", lambda f: of_bytes(f, CHATML, image_token="<|endoftext|>")),
    "typed parts only": ("auto", lambda f: of_bytes(f, TYPED_CHATML, eos="<|endoftext|>")),
    "says its beginning": ("auto", lambda f: of_pieces(f, INSTRUCT)),
    "vicuna_v1": ("vicuna_v1", lambda f: of_bytes(f, bos="<s>")),
    "vicuna_v1 in place of the tokenizer's own": ("vicuna_v1", lambda f: of_bytes(f, CHATML)),
    "vicuna_v1, blanks behind special tokens": ("vicuna_v1", of_pieces),
    "llama_3": ("llama_3", lambda f: of_bytes(f, None, LLAMA_3[0], LLAMA_3[-1], f"{LLAMA_3[0]} $A")),
    "plain": ("plain", lambda f: of_bytes(f, CHATML, bos="<s>")),
}  # fmt: skip


def test_a_template_that_asks_the_clock_is_not_left_as_it_was(tmp_path: Path) -> None:
    """It asks as training did today, whose date the recipe has fixed; tomorrow it would not."""
    today = datetime.now().strftime("%Y-%m-%d")
    checkpoint = checkpoint_of(
        tmp_path,
        lambda f: of_bytes(f, "{{ strftime_now('%Y-%m-%d') }}" + TYPED_OR_TEXT),
        template_arguments={"strftime_now": today},
    )
    config = config_from_tree(Manifest.read(checkpoint).config, "recipe")
    asking = Asking.of(checkpoint, config, 0)
    assert asking.is_asked_alike(checkpoint / "tokenizer")
    assert not asking.is_asked_alike(checkpoint / "tokenizer", on_any_day=True)


TYPED_OR_TEXT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ p['text'] if p['type'] == 'text' else '<image>' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_load_ask_as_training_did(tmp_path, kind, caplog):
    from transformers import AutoProcessor

    (template, make), arguments = KINDS[kind], ARGUMENTS.get(kind, {})
    checkpoint = checkpoint_of(tmp_path, make, template=template, template_arguments=arguments)
    plan_export(checkpoint, "llava-hf").write(tmp_path / "out")
    assert not [record for record in caplog.records if "asking" in record.name]
    tokenizer = load_tokenizer(checkpoint / "tokenizer", "<image>")
    encoder = ConversationEncoder(tokenizer, template, "<image>", TOKENS_PER_IMAGE, arguments=arguments)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert check_tokens(processor, encoder, template, 50) >= (50 if template == "plain" else 60)
    stops = find_stop_ids(encoder, 2)
    told = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(told) == stops
    foreign = open_foreign(tmp_path / "out")
    assert (foreign.template, foreign.image_mode, foreign.image_token) == (template, "pad", "<image>")
    again = ConversationEncoder.of(
        config_of(foreign).data, load_tokenizer(foreign.tokenizer, "<image>"), TOKENS_PER_IMAGE
    )
    assert find_stop_ids(again, foreign.language.eos_token_id) == stops
    for turns, num_images in conversations(template, 12):
        sample = Sample("", tuple(turns), ("",) * num_images, "")
        if kind != "says its beginning" and (template != "plain" or num_images):
            assert again.encode_prompt(sample).ids == encoder.encode_prompt(sample).ids


ENDS = {  # of `KINDS`: the tokenizer's own end, and what their templates end answers with
    "typed parts only": {"<|endoftext|>", "<|im_end|>"},
    "llama_3": {"<|eot_id|>", "<|end_of_text|>"},
    "vicuna_v1 in place of the tokenizer's own": {"</s>"},
}


@pytest.mark.parametrize("kind", ENDS)
def test_all_ends_of_an_answer_are_told_and_read(tmp_path, kind):
    """Id 2, which config.json names, is a letter; one more that is told beside an export ends answers too."""
    template, make = KINDS[kind]
    checkpoint, out = checkpoint_of(tmp_path, make, template=template), tmp_path / "out"
    plan_export(checkpoint, "llava-hf").write(out)
    tokenizer, file = load_tokenizer(out, "<image>"), out / "generation_config.json"
    told = json.loads(file.read_text())
    assert set(tokenizer.convert_ids_to_tokens(told["eos_token_id"])) == ENDS[kind]
    more = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    file.write_text(json.dumps({**told, "eos_token_id": [*told["eos_token_id"], more]}))
    foreign = open_foreign(out)
    encoder = ConversationEncoder.of(config_of(foreign).data, tokenizer, TOKENS_PER_IMAGE)
    assert find_stop_ids(encoder, foreign.language.eos_token_id) == {*told["eos_token_id"], more}


def test_a_trained_import_that_is_given_back_is_asked_as_it_was_trained(tmp_path):
    """In the files that it came with, which take no typed parts and name no end."""
    from transformers import AutoProcessor

    source, out = llava_hf(tmp_path / "source"), tmp_path / "out"
    (source / "generation_config.json").write_text(json.dumps({"max_length": 77}))
    checkpoint = import_model(open_foreign(source), tmp_path / "ours")
    manifest = replace(Manifest.read(checkpoint), step=1)
    checkpoint = checkpoint.rename(checkpoint.with_name("step_0000001"))
    manifest.write(checkpoint)
    plan_export(checkpoint).write(out)
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (source / weights).read_bytes()
    encoder = ConversationEncoder(
        load_tokenizer(checkpoint / "tokenizer", "<image>"), manifest.config["data"]["template"], "<image>", 16
    )
    assert check_tokens(AutoProcessor.from_pretrained(out), encoder, "auto", 12) >= 12
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert encoder.tokenizer.convert_ids_to_tokens(ends) == ["</s>"]
    assert "Trained with megatron_vlm" in (out / "README.md").read_text()
    assert (out / "README_of_origin.md").read_bytes() == (source / "README.md").read_bytes()


def test_arguments_and_image_mode_come_back_as_a_recipe_s_words(tmp_path):
    """From an import of the export too; the day that the template saw is the program's own by then."""
    arguments = {"style": ["long", "!"], "strftime_now": "2026-09-30"}
    checkpoint = checkpoint_of(
        tmp_path, lambda f: of_bytes(f, CLOCKED), template_arguments=arguments, image_mode="resize"
    )
    plan_export(checkpoint, "llava-hf").write(tmp_path / "out")
    foreign = open_foreign(tmp_path / "out")
    again = import_model(foreign, tmp_path / "again")
    for data in (config_of(foreign).data, config_from_tree(Manifest.read(again).config, "recipe").data):
        assert data.template_arguments == {"style": ["long", "!"]} and data.image_mode == "resize"


def test_verify_shows_images_as_training_did_and_tells_what_is_asked_otherwise(tmp_path):
    from megatron_vlm.conversion.verify.comparing import compare, make_probe, open_side

    checkpoint = checkpoint_of(tmp_path, lambda f: of_bytes(f, CHATML), template="vicuna_v1", image_mode="resize")
    plan_export(checkpoint, "llava-hf").write(tmp_path / "out")
    Image.linear_gradient("L").resize((60, 28)).convert("RGB").save(tmp_path / "a.png")
    shown = {}
    for mode in ("resize", "pad"):
        record = json.loads((tmp_path / "out" / "megatron_vlm.json").read_text())
        (tmp_path / "out" / "megatron_vlm.json").write_text(json.dumps({**record, "image_mode": mode}))
        side = open_side(str(tmp_path / "out"), {})
        shown[mode] = make_probe(side, side, [tmp_path / "a.png"], "").pixels
        result = compare(str(tmp_path / "out"), str(checkpoint), [tmp_path / "a.png"])
        assert result.agrees
        told = [note for note in result.notes if "data." in note]
        assert told == ([] if mode == "resize" else ["A is asked with data.image_mode 'pad', B with 'resize'"])
    assert (shown["resize"] - shown["pad"]).abs().max() > 0.5


def test_the_card_claims_what_is_known(tmp_path):
    """The licence that the origin's card names, else none; template, image mode and update."""
    import re

    source = llava_hf(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: llama2\ntags: [a]\n---\nlicense: mine\n")
    checkpoint = import_model(open_foreign(source), tmp_path / "ours")
    plan_export(checkpoint, "llava").write(tmp_path / "known")
    card = (tmp_path / "known" / "README.md").read_text()
    head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert head is not None and "license: llama2" in head[1].splitlines() and "library_name" not in head[1]
    (tmp_path / "new").mkdir()
    fresh = checkpoint_of(tmp_path / "new", lambda f: of_bytes(f, CHATML), template="vicuna_v1", image_mode="resize")
    plan_export(fresh).write(tmp_path / "unknown")
    card = (tmp_path / "unknown" / "README.md").read_text()
    assert "license:" not in card and "Unknown: " in card and str(tmp_path) not in card
    assert all(word in card for word in ("`vicuna_v1`", "`resize`", "AutoProcessor", "from megatron_vlm import load"))
