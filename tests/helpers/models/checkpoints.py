"""A checkpoint's directory of small files with their manifest, which holds no weights."""

from pathlib import Path

from megatron_vlm.checkpoint.integrity import records_of
from megatron_vlm.checkpoint.manifest import ALWAYS_THERE, Manifest
from megatron_vlm.config.loading import hash_of_tree


def a_checkpoint(directory: Path) -> Manifest:
    """Files, one of them empty, and their manifest; the step is the directory's, where its name says one."""
    (directory / "tokenizer").mkdir(parents=True)
    files = {"a": b"weights" * 1000, "tokenizer/t.json": b"{}", "empty": b""}
    files |= {name: b"not read here" for name in ALWAYS_THERE}
    step = int(directory.name.removeprefix("step_"))
    for name, content in files.items():
        (directory / name).write_bytes(content)
    records = records_of(directory, [directory / name for name in files])
    manifest = Manifest(
        step=step, config={"x": 1}, config_hash=hash_of_tree({"x": 1}), components=["language"], vocab_size=8,
        layout={"tensor": 1}, data_fingerprint={"samples": 1}, files=records,
    )  # fmt: skip
    manifest.write(directory)
    return manifest
