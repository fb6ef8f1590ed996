"""Asks a model questions about images.

megatron-vlm generate CHECKPOINT --media a.png --prompt "What is this?"
megatron-vlm generate CHECKPOINT --media a.png b.png --prompt "Which image shows the larger digit?"
megatron-vlm generate CHECKPOINT --media clip.mp4 --prompt "What happens?"
megatron-vlm generate CHECKPOINT --media a.png --chat --temperature 0.7 --top-p 0.9
megatron-vlm generate CHECKPOINT --devices 0 1 --prompt "What is this?"
megatron-vlm launch --local --ranks 4 -- generate CHECKPOINT --tensor 2 --pipeline 2 --prompt "What?"
megatron-vlm generate CHECKPOINT --devices 0 1 2 3 --tensor 2 --ring 2 --prompt "What is this?"
megatron-vlm generate VILA --format-option downsample_order=row --prompt "What is this?"    what it leaves open

CHECKPOINT is one of ours, a Hugging Face llava-hf or LLaVA directory, or the hub id of one. Images come before the
text, unless the prompt says with <image> where each belongs. A video (or a folder of frames) is shown as the frames
that data.video of the checkpoint's recipe takes of it.

With --chat every line of standard input is a turn, and every line printed an answer; what was said and shown is kept.
A line "/media FILE ..." shows more images with the next turn. The end of the input ends the conversation.
"""

import argparse
import logging
import math
import shlex
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vlm.errors import ConfigError, DataError, one_line, shown
from megatron_vlm.runtime.command_line import CHOICES, CommandLine, whole_number
from megatron_vlm.runtime.waiting import told_if_slow

if TYPE_CHECKING:
    from megatron_vlm.runtime.launch import Launch

MEDIA = "/media"


def main() -> None:
    with read_command_line().run() as (arguments, launch):
        if arguments.prompt is None and not arguments.chat:
            raise ConfigError("--prompt: missing; give a question, or --chat")
        if arguments.chat and launch.world_size > 1:
            raise ConfigError(
                f"--chat: found {launch.world_size} ranks, needs one process; --devices starts ranks itself"
            )
        from megatron_vlm import load
        from megatron_vlm.runtime.distributed import teardown
        from megatron_vlm.runtime.logging import get_logger

        get_logger("megatron_vlm").setLevel(logging.WARNING)  # what is printed is the result
        layout = ("devices", "device", "tensor", "pipeline", "ulysses", "ring")
        options = {name: getattr(arguments, name) for name in (*layout, *CHOICES)}
        with told_if_slow(f"loading {arguments.checkpoint}"):
            assistant = load(arguments.checkpoint, **options)
        answer(assistant, arguments, launch)
        if arguments.devices is None:  # ranks behind the call end with this process
            teardown()


def read_command_line() -> CommandLine:
    """All options."""
    parser = CommandLine(__doc__)
    parser.add_argument(
        "checkpoint",
        help="a checkpoint, a directory of them (its latest), a model directory or hub id (org/name@revision)",
    )
    parser.add_argument("--media", nargs="+", default=[], type=Path, metavar="FILE", help="images and videos, in order")
    parser.add_argument("--prompt", help="the question; with --chat the first turn")
    parser.add_argument("--chat", action="store_true", help="a conversation on standard input")
    parser.add_argument(
        "--max-new-tokens", type=whole_number(1), default=64, metavar="N", help="longest answer (default 64)"
    )
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="what ends an answer, besides its end")
    parser.add_argument(
        "--temperature", type=number, default=0.0, metavar="T", help="0, the default, takes the likeliest token"
    )
    parser.add_argument("--top-k", type=whole_number(1), metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=number, metavar="P", help="draw from the likeliest that add up to P")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of the draws (default 0)")
    parser.add_argument(
        "--devices", nargs="+", type=device, metavar="D", help="GPUs' numbers, or cpu so many times: ranks of one model"
    )
    parser.add_layout()
    return parser


def answer(assistant: Any, arguments: argparse.Namespace, launch: "Launch") -> None:
    """Prints the answer, or holds the conversation. Raises as `Assistant.generate`."""
    options = {name: getattr(arguments, name) for name in ("stop", "temperature", "top_k", "top_p", "seed")}
    options["max_new_tokens"] = arguments.max_new_tokens
    if arguments.chat:
        chat(assistant, arguments, options)
    elif launch.world_size == 1 or assistant.model.grid.coordinates.data == 0:  # further replicas have nothing to do
        with told_if_slow("answering"):
            found = assistant.generate([*arguments.media, arguments.prompt], **options)
        if launch.rank == 0:
            print(shown(found))


def chat(assistant: Any, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Turns from standard input until its end; what is wrong with one costs a line on stderr."""
    from megatron_vlm.generation.chat import Chat

    conversation, media = Chat(assistant, **options), list(arguments.media)
    if arguments.prompt is not None:
        print(shown(conversation.say([*media, arguments.prompt])), flush=True)
        media = []
    prompt = "> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is told, and the next one read
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        try:
            if line.split()[:1] == [MEDIA]:
                media += [Path(name) for name in shlex.split(line)[1:]]
            elif line:
                print(shown(conversation.say([*media, line])), flush=True)
                media = []
        except (DataError, ValueError) as error:
            sys.stderr.write(f"error: {one_line(error)}\n")
            media = []


def device(text: str) -> int | str:
    """A GPU's number, or cpu."""
    if text != "cpu" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}, needs a GPU's number or cpu")
    return text if text == "cpu" else int(text)


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"found {text!r}, needs a number")
    return value


if __name__ == "__main__":
    main()
