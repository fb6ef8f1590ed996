"""Asks a checkpoint a question about images.

python tools/generate.py CHECKPOINT --media a.png --prompt "What is this?"
python tools/generate.py CHECKPOINT --media a.png b.png --prompt "Which image shows the larger digit?"

Images come before the text, unless the prompt says with <image> where each belongs.
"""

import logging
from pathlib import Path

from megatron_vlm.runtime.command_line import CommandLine, whole_number


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint directory, or a directory of checkpoints (its latest)")
    parser.add_argument("--media", nargs="+", default=[], type=Path, metavar="FILE", help="images, in order")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument(
        "--max-new-tokens", type=whole_number(1), default=64, metavar="N", help="longest answer (default 64)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    with parser.run() as (arguments, _launch):
        from megatron_vlm import load
        from megatron_vlm.runtime.distributed import teardown
        from megatron_vlm.runtime.logging import get_logger

        get_logger("megatron_vlm").setLevel(logging.WARNING)  # what is printed is the result
        assistant = load(arguments.checkpoint, device=arguments.device)
        print(assistant.generate([*arguments.media, arguments.prompt], max_new_tokens=arguments.max_new_tokens))
        teardown()


if __name__ == "__main__":
    main()
