"""Time and memory of an import and an export, beside `cp` and transformers, in one run.

The model is a `llava-hf` directory of random bf16 weights, made under --folder. In each round the sides take turns:
`cp` of the directory, brought to the disk as an import's files are; the import; the export of it; transformers' load
and save. Memory is the anonymous memory of all processes of a side, summed, at its peak; the interpreter's is what
`convert.py inspect` of a tiny model needs, which imports the same and converts nothing.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_vlm.runtime.command_line import whole_number
from megatron_vlm.runtime.launch import Launch

GIGABYTE, MIBIBYTE = 10**9, 2**20
SAMPLE_SECONDS = 0.05
TOOL = Path(__file__).parents[2] / "convert.py"
WIDTH, HEADS, MLP, VOCABULARY = 2048, 16, 5632, 32064
LAYER_BYTES = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)
TRANSFORMERS = (
    "import sys; from transformers import LlavaForConditionalGeneration as Model; "
    "Model.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])"
)


@dataclass(frozen=True)
class Cost:
    """Cost of one run of one side."""

    seconds: float
    peak_anonymous_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's command line."""
    parser.add_argument("--size", type=float, default=4.0, metavar="GB", help="of the model's weights (default 4)")
    parser.add_argument("--rounds", type=whole_number(1), default=3, metavar="N", help="per side (default 3)")
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for five times the model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured")
    parser.set_defaults(measure=run)


def run(arguments: argparse.Namespace, launch: Launch) -> None:
    """Measures and tells."""
    folder = arguments.folder / "bench_conversion"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        result = measure(folder, arguments.size, arguments.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


def measure(folder: Path, size_gigabytes: float, rounds: int) -> dict[str, Any]:
    """All sides, taking turns."""
    from .. import report

    source, copied, ours, exported, saved = (folder / n for n in ("source", "copied", "ours", "exported", "saved"))
    make_model(source, size_gigabytes)
    make_model(folder / "tiny", 0.0)
    convert = [sys.executable, str(TOOL)]
    sides: dict[str, Callable[[], Cost]] = {
        "interpreter": lambda: cost_of([*convert, "inspect", str(folder / "tiny")]),
        "cp": lambda: cost_of(["sh", "-c", f"cp -r {source} {copied} && sync {copied}/*"]),
        "import": lambda: cost_of([*convert, "import", str(source), str(ours)]),
        "export": lambda: cost_of([*convert, "export", str(ours), str(exported)]),
        "transformers": lambda: cost_of([sys.executable, "-c", TRANSFORMERS, str(source), str(saved)]),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            costs[name].append(side())
        same = all((exported / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())
        if not same:
            raise AssertionError("what was exported is not what was imported")
        for path in (copied, ours, exported, saved):
            shutil.rmtree(path)
    seconds = {name: statistics.median(cost.seconds for cost in of_side) for name, of_side in costs.items()}
    peaks = {name: max(cost.peak_anonymous_bytes for cost in of_side) for name, of_side in costs.items()}
    return report.header("conversion", "CPU") | {
        "model_bytes": sum(path.stat().st_size for path in folder.glob("source/*")),
        "rounds": rounds,
        "all_seconds": {name: [cost.seconds for cost in of_side] for name, of_side in costs.items()},
        "seconds": seconds,
        "peak_anonymous_bytes": peaks,
        "import_bytes_over_interpreter": peaks["import"] - peaks["interpreter"],
        "export_bytes_over_interpreter": peaks["export"] - peaks["interpreter"],
        "ratio": {
            "import / cp": seconds["import"] / seconds["cp"],
            "import / transformers": seconds["import"] / seconds["transformers"],
            "export / cp": seconds["export"] / seconds["cp"],
        },
    }


def cost_of(command: list[str]) -> Cost:
    """Runs it to its end, on the cores and in the manner of any program."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        assert process.stderr is not None
        if process.returncode != 0:
            raise AssertionError(f"{shlex.join(command)}: {process.stderr.read()[-2000:]}")
    return Cost(seconds, peak)


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process and its descendants; one that is gone has none."""
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
    return total


def make_model(folder: Path, size_gigabytes: float) -> None:
    """A `llava-hf` directory of about that many bytes, random, written without being held; at least one layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    from ..training.synthetic import make_tokenizer

    folder.mkdir()
    num_layers = max(1, round(size_gigabytes * GIGABYTE / LAYER_BYTES))
    text = AutoConfig.for_model(
        "llama", hidden_size=WIDTH, intermediate_size=MLP, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        num_hidden_layers=num_layers, vocab_size=VOCABULARY, tie_word_embeddings=False,
    )  # fmt: skip
    config = LlavaConfig(text_config=text, tie_word_embeddings=False, architectures=["LlavaForConditionalGeneration"])
    config.dtype = "bfloat16"
    with torch.device("meta"):
        state = LlavaForConditionalGeneration(config).state_dict()
    noise = torch.randn(max(tensor.numel() for tensor in state.values())).bfloat16() * 0.02
    config.save_pretrained(folder)
    make_tokenizer(folder, 300)
    names = sorted(state)
    shards = [names[i :: max(1, round(size_gigabytes))] for i in range(max(1, round(size_gigabytes)))]
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: noise[: state[name].numel()].view(state[name].shape).clone() for name in shard}, folder / file)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """A table for a person."""
    lines = [f"{result['model_bytes'] / GIGABYTE:.2f} GB, median of {result['rounds']} rounds"]
    for name, seconds in result["seconds"].items():
        peak = result["peak_anonymous_bytes"][name] / MIBIBYTE
        lines.append(f"  {name:13} {seconds:8.1f} s   peak anonymous {peak:8,.0f} MiB")
    lines += [f"  {name}: {ratio:.2f}" for name, ratio in result["ratio"].items()]
    over = {side: result[f"{side}_bytes_over_interpreter"] / MIBIBYTE for side in ("import", "export")}
    lines += [f"  {side}: {mib:,.0f} MiB over the interpreter's" for side, mib in over.items()]
    return "\n".join(lines)
