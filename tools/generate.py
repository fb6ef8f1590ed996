"""Asks a checkpoint a question about images.

python tools/generate.py CHECKPOINT --media a.png --prompt "What is this?"
python tools/generate.py CHECKPOINT --media a.png b.png --prompt "Which image shows the larger digit?"
torchrun --nproc-per-node 4 tools/generate.py CHECKPOINT --tensor 2 --pipeline 2 --prompt "What is this?"

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
    parser.add_layout()
    with parser.run() as (arguments, launch):
        from megatron_vlm import load
        from megatron_vlm.runtime.distributed import teardown
        from megatron_vlm.runtime.logging import get_logger

        get_logger("megatron_vlm").setLevel(logging.WARNING)  # what is printed is the result
        layout = {"tensor": arguments.tensor, "pipeline": arguments.pipeline}
        assistant = load(arguments.checkpoint, device=arguments.device, **layout)
        if assistant.model.grid.coordinates.data == 0:  # one replica answers, further ones have nothing to do
            answer = assistant.generate([*arguments.media, arguments.prompt], arguments.max_new_tokens)
            if launch.rank == 0:
                print(answer)
        teardown()


if __name__ == "__main__":
    main()
