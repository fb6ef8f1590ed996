"""The commands that are measured, what each may cost, and the small models and data that they are given."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TORCH, TRANSFORMERS = "import torch, transformers", "transformers' generate"  # what is divided by
SUBCOMMANDS = {"convert.py": ("import", "export", "verify", "inspect")}
HELP_LIMIT, KEY_LIMIT, INSPECT_LIMIT, RULE_LIMIT, GENERATE_LIMIT, STEP_LIMIT = 0.2, 0.2, 0.3, 1.2, 1.5, 2.5
FIRST_STEP, NUM_RANKS = "train: first step of the quickstart, a rank", 4
RECIPE = "examples/recipes/quickstart_phase1.yaml"
QUESTION = "What digit is this?"
LANGUAGE = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
TOWER = {
    "model_type": "clip_vision_model", "image_size": 28, "patch_size": 7, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
THEIR_GENERATE = """
import sys
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, image, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, backend="pil")
model = LlavaForConditionalGeneration.from_pretrained(folder)
turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
inputs = processor(images=Image.open(image), text=prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        words: what follows the interpreter.
        limit: of its processor time over its base's.
        base: the name of the command that it is divided by.
        code: that it ends with.
    """

    words: tuple[str, ...]
    limit: float = float("inf")
    base: str = TORCH
    code: int = 0


@dataclass(frozen=True)
class Checkout:
    """A checkout of this repository, whose commands are run from its root and with its packages."""

    root: Path

    def line(self, *words: str) -> list[str]:
        """The command line of an interpreter that finds this checkout's packages before all others."""
        return ["env", f"PYTHONPATH={self.root}:{self.root / 'kernels'}", sys.executable, *words]

    def run(self, *words: str) -> None:
        """Runs a command of it that prepares something."""
        done = subprocess.run(self.line(*words), cwd=self.root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def commands(checkout: Checkout, folder: Path) -> dict[str, Command]:
    """All but the first step of training, by name, on what `prepare` left in `folder`."""
    tools = sorted(path.name for path in (checkout.root / "tools").glob("*.py"))
    lines = [(name, *sub) for name in tools for sub in ((), *((one,) for one in SUBCOMMANDS.get(name, ())))]
    found = {TORCH: Command(("-c", TORCH))}
    for name, *sub in lines:
        found[" ".join([name, *sub, "--help"])] = Command((f"tools/{name}", *sub, "--help"), HELP_LIMIT)
    train = ("tools/train.py", RECIPE, *overrides(folder))
    asked = (str(folder / "image.png"), QUESTION)
    ours = ("tools/generate.py", str(folder / "ours"), "--media", asked[0], "--prompt", asked[1])
    return found | {
        "train: a mistyped key": Command((*train, "data.pakcing=true"), KEY_LIMIT, code=1),
        "convert inspect: a checkpoint of ours": Command(
            ("tools/convert.py", "inspect", str(folder / "ours")), INSPECT_LIMIT
        ),
        "convert inspect: llava-hf": Command(("tools/convert.py", "inspect", str(folder / "theirs")), INSPECT_LIMIT),
        "train: a broken rule": Command((*train, "parallel.tensor=3"), RULE_LIMIT, code=1),
        TRANSFORMERS: Command(("-c", THEIR_GENERATE, str(folder / "theirs"), *asked)),
        "generate: one word": Command((*ours, "--max-new-tokens", "1"), GENERATE_LIMIT, TRANSFORMERS),
    }


def overrides(folder: Path) -> list[str]:
    """Overrides that point the quickstart's recipe at the data in `folder`."""
    data = folder / "quickstart"
    return [
        f"data.path={data / 'train.json'}",
        f"model.language.tokenizer={data / 'tokenizer'}",
        f"checkpoint.directory={folder / 'run'}",
    ]


def prepare(checkout: Checkout, folder: Path) -> None:
    """Makes the quickstart's data, a tiny model as a checkpoint of ours and as `llava-hf`, and an image."""
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil

    checkout.run("examples/quickstart/make_data.py", str(folder / "quickstart"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "quickstart" / "tokenizer")
    tokenizer.save_pretrained(folder / "language")
    torch.manual_seed(0)
    language: dict[str, Any] = LANGUAGE | {"vocab_size": len(tokenizer) + 8}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**language)).save_pretrained(folder / "language")
    AutoModel.from_config(AutoConfig.for_model(**TOWER)).save_pretrained(folder / "tower")
    square = {"height": TOWER["image_size"], "width": TOWER["image_size"]}
    CLIPImageProcessorPil(size={"shortest_edge": TOWER["image_size"]}, crop_size=square).save_pretrained(
        folder / "tower"
    )
    tower = ("--tower", str(folder / "tower"))
    checkout.run("tools/convert.py", "import", str(folder / "language"), str(folder / "ours"), *tower)
    checkout.run("tools/convert.py", "export", str(folder / "ours"), str(folder / "theirs"), "--format", "llava-hf")
    records = json.loads((folder / "quickstart" / "train.json").read_text())
    image = records[0]["image"]
    Image.open(folder / "quickstart" / (image if isinstance(image, str) else image[0])).save(folder / "image.png")
