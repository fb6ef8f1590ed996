"""Tokenizer directories: tokenizer.json and what stands beside it; up to ids of a conversation."""

import json
from pathlib import Path
from random import Random

from megatron_vlm.data.sample import Sample, Turn
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import check_vocabulary, load_tokenizer
from megatron_vlm.errors import MegatronVlmError
from tests.fuzz import hostile
from tests.fuzz.kind import Kind, Read
from tests.fuzz.tripwire import PLANTED
from tests.helpers.models.foreign_models import tree
from tests.helpers.models.tiny import tiny_tokenizer

PARTS = (
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "a"}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "a" * 1_000}),
    ("normalizer", {"type": "Prepend", "prepend": "é" * 10_000}),
    ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 1_000}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True}),
    ("pre_tokenizer", {"type": "Metaspace", "replacement": "", "prepend_scheme": "always"}),
    ("pre_tokenizer", None),
    ("decoder", {"type": "Strip", "content": "a", "start": 10**18, "stop": 0}),
    ("post_processor", {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}),
    ("post_processor", {"type": "RobertaProcessing", "sep": ["", 10**9], "cls": ["", 0], "trim_offsets": True,
                        "add_prefix_space": True}),
    ("model", {"type": "WordLevel", "vocab": {"a": 0, "b": 10**9}, "unk_token": "a"}),
    ("model", {"type": "WordPiece", "vocab": {}, "unk_token": "x", "continuing_subword_prefix": "",
               "max_input_chars_per_word": 0}),
    ("model", {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]], "byte_fallback": True}),
    ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}),
    ("truncation", {"max_length": 0, "strategy": "LongestFirst", "stride": 10**9, "direction": "Right"}),
    ("truncation", {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
    ("padding", {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "x"}),
    ("added_tokens", [{"id": 10**9, "content": "", "special": True, "single_word": False, "lstrip": False,
                       "rstrip": False, "normalized": False}]),
)  # fmt: skip
SETTINGS: tuple[str, ...] = ("tokenizer_class", "auto_map", "model_max_length", "bos_token", "eos_token", "use_fast")
SETTINGS += ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "fast_tokenizer_files")
SETTINGS += ("split_special_tokens",)
CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "BertTokenizer", "ByT5Tokenizer", "x",
           "T5Tokenizer", "CLIPTokenizer", "TokenizersBackend", "BertJapaneseTokenizer", "MyT5Tokenizer")  # fmt: skip


def prepare(folder: Path) -> dict[str, bytes]:
    load_tokenizer(tiny_tokenizer(folder), "<image>")
    return tree(folder / "tokenizer")


def make(random: Random, base: dict[str, bytes], folder: Path) -> Read:
    for name, data in base.items():
        (folder / name).write_bytes(data)
    (folder / f"{PLANTED}.py").write_text("from tests.fuzz import tripwire\ntripwire.fire()\nclass Planted: pass\n")
    kind = random.randrange(10)
    main, settings = json.loads(base["tokenizer.json"]), json.loads(base["tokenizer_config.json"])
    if kind < 4:
        part = random.choice(
            ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model", None)
        )
        if part is None:
            main = hostile.tree(random, main)
        elif part == "model":
            small = {**main["model"], "vocab": dict(list(main["model"]["vocab"].items())[:300])}
            main["model"] = hostile.tree(random, small)
        else:
            main[part] = hostile.tree(random, main.get(part))
        written = json.dumps(main).encode()
        (folder / "tokenizer.json").write_bytes(
            written if random.random() < 0.8 else hostile.json_text(random, written)
        )
    elif kind < 6:
        main |= dict(random.sample(PARTS, random.choice((1, 1, 2))))
        (folder / "tokenizer.json").write_text(json.dumps(main))
    elif kind < 8:
        settings[random.choice(SETTINGS)] = hostile.value(random)
        if random.random() < 0.3:
            settings["tokenizer_class"] = random.choice(CLASSES)
        if random.random() < 0.3:
            settings["auto_map"] = {"AutoTokenizer": [f"{PLANTED}.Planted", f"{PLANTED}.Planted"]}
        written = json.dumps(settings).encode()
        (folder / "tokenizer_config.json").write_bytes(
            written if random.random() < 0.8 else hostile.json_text(random, written)
        )
    elif kind == 8:
        hostile.in_its_place(random, folder / random.choice(list(base)))
    else:
        name = random.choice(
            ("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "config.json")
        )
        data = hostile.json_bytes(random, {"bos_token": "a", "<x>": 5, "model_type": "llama", "auto_map": {}})
        (folder / name).write_bytes(data)
        if random.random() < 0.5:
            (folder / "tokenizer.json").unlink()
    return lambda: _read(folder)


def _read(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, "<image>")
    turns = (Turn("user", "<image>\nWhat is this? " + "x" * 200), Turn("assistant", "a red square é😀"))
    try:
        encoder = ConversationEncoder(tokenizer, "auto", "<image>", 16)
    except MegatronVlmError:  # what it says of the template; ids are asked for all the same
        encoder = ConversationEncoder(tokenizer, "plain", "<image>", 16)
    encoded = encoder.encode(Sample("a", turns, ("a.png",), "train.json element 0"))
    tokenizer.decode(encoded.ids)
    check_vocabulary(tokenizer, "<image>", 1_000)


TOKENIZERS = Kind("tokenizer", 400, prepare, make)
