"""Decoding speed of a recipe's language model against transformers' `generate`: greedy, kv cache, SDPA attention.

Each side runs in a process of its own and starts from the same weights (the recipe's, random) and the same random
prompts of text. For each batch size the sides take turns, a round each; a round is one answer of `--new-tokens` tokens
and one of a single token, and their difference, over the tokens in between, is the time of a token. The medians of the
rounds count. Unless both sides answer the same tokens nothing is reported. The ratio is transformers' time over ours,
the least over the batch sizes.
"""

import argparse
import contextlib
import gc
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_vlm.config import load_config
from megatron_vlm.config.schema import Config
from megatron_vlm.errors import ConfigError, MegatronVlmError
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.launch import Launch

from ..training.sides import PRODUCT, TRANSFORMERS
from ..training.throughput import SidesDifferError, ask, receive

Generate = Callable[[Any, int], list[list[int]]]  # prompts [b, s], new tokens -> answers


@dataclass(frozen=True)
class Answered:
    """One call of a side's generate."""

    seconds: float
    cpu_seconds: float
    rows: list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's command line."""
    assert isinstance(parser, CommandLine)
    parser.add_argument("recipe", help="a YAML recipe, see tools/benchmarks/recipes/bench_*.yaml")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument(
        "--batch", type=whole_number(1), nargs="+", default=[1, 8], metavar="B", help="batch sizes (default 1 8)"
    )
    parser.add_argument(
        "--prompt-tokens", type=whole_number(1), default=64, metavar="N", help="of every row (default 64)"
    )
    parser.add_argument(
        "--new-tokens", type=whole_number(2), default=64, metavar="N", help="of every answer (default 64)"
    )
    parser.add_argument("--rounds", type=whole_number(1), default=7, metavar="N", help="per side (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a section of docs/benchmarks, appended")
    parser.set_defaults(measure=run)


def run(arguments: argparse.Namespace, launch: Launch) -> None:
    """Measures and tells. Raises ConfigError on several ranks, and for a recipe that does not build."""
    from .. import report

    if launch.world_size > 1:
        raise ConfigError(f"decoding is measured in one process per side, found {launch.world_size} ranks")
    config = load_config(arguments.recipe, arguments.overrides)
    batches = measure(config, arguments)
    device = "CPU" if config.runtime.device == "cpu" else config.runtime.device
    result = report.header("decoding", device) | {
        "recipe": arguments.recipe,
        "config": config.model_dump(mode="json"),
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "rounds": arguments.rounds,
        "batches": batches,
        "ratio": min(batch["ratio"] for batch in batches.values()),
    }
    report.keep(result, markdown(result), arguments)
    for row in rows(result):
        print(" | ".join(row))
    print(f"ratio {result['ratio']:.2f}: transformers' time per token over megatron_vlm's, the least")


def measure(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures both sides' times per token by batch size, and their ratio. Raises SidesDifferError where answers do."""
    found = {}
    with started(config, PRODUCT) as ours, started(config, TRANSFORMERS) as theirs:
        sides = {PRODUCT: ours, TRANSFORMERS: theirs}
        for side in sides.values():
            receive(side)
        for batch in arguments.batch:
            shape = batch, arguments.prompt_tokens
            first = {name: ask(side, (shape, arguments.new_tokens)) for name, side in sides.items()}  # warms up too
            if first[PRODUCT].rows != first[TRANSFORMERS].rows:
                raise SidesDifferError(f"the sides do not answer the same at batch size {batch}: found other tokens")
            times: dict[str, list[Answered]] = {name: [] for name in sides}
            for _ in range(arguments.rounds):
                for name, side in sides.items():
                    whole, one = (ask(side, (shape, number)) for number in (arguments.new_tokens, 1))
                    times[name].append(per_token(whole, one, arguments.new_tokens))
            found[str(batch)] = compare(times)
    return found


def per_token(whole: Answered, one: Answered, new_tokens: int) -> Answered:
    """The time of a token after the first."""
    steps = new_tokens - 1
    return Answered((whole.seconds - one.seconds) / steps, (whole.cpu_seconds - one.cpu_seconds) / steps, [])


def compare(times: dict[str, list[Answered]]) -> dict[str, Any]:
    """Ready for JSON."""
    from ..report import spread

    sides = {
        name: {
            "seconds_per_token": spread([one.seconds for one in of_side]),
            "cpu_seconds_per_token": spread([one.cpu_seconds for one in of_side]),
        }
        for name, of_side in times.items()
    }

    def ratio(key: str) -> float:
        return float(sides[TRANSFORMERS][key]["median"] / sides[PRODUCT][key]["median"])

    return {"sides": sides, "ratio": ratio("seconds_per_token"), "ratio_of_cpu_seconds": ratio("cpu_seconds_per_token")}


@contextlib.contextmanager
def started(config: Config, name: str) -> Iterator[Connection]:
    """A side's process; it ends with the block."""
    spawning = multiprocessing.get_context("spawn")
    here, there = spawning.Pipe()
    child = spawning.Process(target=serve, args=(config, name, there), daemon=True)
    child.start()
    there.close()
    try:
        yield here
    finally:
        child.terminate()
        child.join()


def serve(config: Config, name: str, connection: Connection) -> None:
    """The child's main function: says that it is ready, then answers ((rows, prompt tokens), new tokens), or tells the
    error that ended it."""
    from megatron_vlm.runtime.logging import get_logger, quiet_libraries

    quiet_libraries()
    get_logger("megatron_vlm").setLevel("WARNING")
    try:
        import torch

        generate = _ours(config) if name == PRODUCT else _theirs(config)
        vocabulary = config.model.language.config["vocab_size"] if config.model.language.config else 0
        connection.send(name)
        while True:
            shape, new_tokens = connection.recv()
            prompts = torch.randint(1, vocabulary, shape, generator=torch.Generator().manual_seed(shape[0]))
            gc.collect()
            started, cpu_started = time.perf_counter(), time.process_time()
            rows = generate(prompts, new_tokens)
            connection.send(Answered(time.perf_counter() - started, time.process_time() - cpu_started, rows))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except MegatronVlmError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(f"{name}: {traceback.format_exc()}"))


def _ours(config: Config) -> Generate:
    import torch

    from megatron_vlm.conversion.weights.loading import load_weights
    from megatron_vlm.data.text.tokenizer import load_tokenizer
    from megatron_vlm.generation.decoding import decode
    from megatron_vlm.generation.load import transpose_weights_for_decoding
    from megatron_vlm.generation.prompts import PromptBatch
    from megatron_vlm.generation.sampling import Sampler, Sampling
    from megatron_vlm.generation.stopping import Stopping
    from megatron_vlm.models.description import describe_model
    from megatron_vlm.models.families import build_model
    from megatron_vlm.parallel.groups import GridSizes, build_grid
    from megatron_vlm.runtime.device import prepare
    from megatron_vlm.runtime.distributed import init_world

    from ..training.synthetic import SPECIAL, make_tokenizer

    init_world(Launch(), prepare(config.runtime.device), config.runtime.timeout_seconds)
    grid = build_grid(GridSizes())
    model = build_model(config, describe_model(config.model), grid).train(False)
    load_weights(model, config, grid)
    transpose_weights_for_decoding(model)
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(Path(folder), 2 * len(SPECIAL) + 8)  # no stop string is looked for, so any will do
        stopping = Stopping(load_tokenizer(folder, config.data.image_token), ())

    def generate(prompts: torch.Tensor, new_tokens: int) -> list[list[int]]:
        batch = PromptBatch(prompts, torch.ones_like(prompts, dtype=torch.bool), [], [])
        return decode(model, batch, Sampler(Sampling(), ()), stopping, new_tokens)

    return generate


def _theirs(config: Config) -> Generate:
    import torch

    from megatron_vlm.models.description import describe_model
    from megatron_vlm.runtime.device import current_device, prepare

    from ..training.llava import build_llava

    prepare(config.runtime.device)
    described = describe_model(config.model)
    model = build_llava(config, described.language, described.survey, 0).train(False)
    model.config.text_config.use_cache = True  # off for training
    model.generation_config.eos_token_id = None

    def generate(prompts: torch.Tensor, new_tokens: int) -> list[list[int]]:
        prompts = prompts.to(current_device())
        with torch.no_grad():
            found = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        rows: list[list[int]] = found[:, prompts.shape[1] :].tolist()
        return rows

    return generate


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A heading and a line per batch size."""
    table = [["batch", f"{PRODUCT}, ms/token (min..max)", f"{TRANSFORMERS}, ms/token", "ratio", "by processor time"]]
    for batch, found in result["batches"].items():
        cells = []
        for name in (PRODUCT, TRANSFORMERS):
            seconds = found["sides"][name]["seconds_per_token"]
            median, least, most = (1e3 * seconds[key] for key in ("median", "min", "max"))
            cells.append(f"{median:.2f} ({least:.2f}..{most:.2f})")
        table.append([batch, *cells, f"{found['ratio']:.2f}", f"{found['ratio_of_cpu_seconds']:.2f}"])
    return table


def markdown(result: dict[str, Any]) -> str:
    """A section for docs/benchmarks."""
    from .. import report

    heading, *lines = rows(result)
    return "\n".join(
        [
            f"\n### {Path(result['recipe']).stem}\n",
            f"{report.origin(result)}; prompts of {result['prompt_tokens']} tokens, "
            f"answers of {result['new_tokens']}, {result['rounds']} rounds.\n",
            f"    {result['command']}\n",
            *("| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *lines)),
            "",
        ]
    )
