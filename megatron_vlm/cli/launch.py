"""Runs a command until it is done: here, with restarts, or through SLURM, which it comes back to after every limit.

megatron-vlm launch --local --ranks 8 -- train RECIPE.yaml
megatron-vlm launch --local --ranks 8 -- my_script.py ARGUMENT
megatron-vlm launch [options] -- COMMAND
megatron-vlm launch -J llava-%t -N 4 -t 2-00:00:00 -- bash examples/torchrun/n_nodes.sh RECIPE.yaml

Where. Through srun, which blocks, as vila-run does; with --batch through sbatch, which returns at once. Here, where
--local is given, NO_SLURM is set, there is no srun (sbatch) on PATH, or this is already inside a SLURM job.

Ranks. With --ranks N the command is one of megatron-vlm's, such as train, or a Python script, with its arguments. N
ranks of it run on this machine (auto: one per GPU, or per core), instead of torchrun: what they listen on is bound to
loopback, a signal leaves them the time to save, the exit code is 0 where they end well, and nothing is written after
the line that says why a job failed but that line again. Several nodes take torchrun as the command.

What the command sees. RUN_NAME (the job's name, %t in it replaced by the time) and OUTPUT_DIR (--output-dir, else
runs/MODE/NAME). Arguments are passed as they are, with no shell between: quote nothing twice. Under SLURM it runs once
per node, as job ACCOUNT:MODE/NAME, with its output in OUTPUT_DIR/slurm/JOB-TASK.out and .err.

Time. --save-seconds before the limit every rank gets SIGUSR1; training then saves, and ends with 0. What happens
next: through srun a new allocation, through sbatch (--requeue) a requeue, both as often as it takes; here a restart.
A command that is still running at the limit is ended. Here there is no limit unless --time is given.

Failures. The command is started again up to --max-restarts times, except after SIGTERM or SIGINT to this launcher,
which are passed on (ranks save at the first). Two in a row with the same code, both within --quick-seconds of the
start, are an error to mend and end it. The exit code is the command's, 128 + N if signal N ended it, and 124 if it was
stopped at a time limit with no restart left.
"""

import sys
from pathlib import Path

from megatron_vlm.cli.commands import COMMANDS, command_words
from megatron_vlm.errors import ConfigError
from megatron_vlm.registry import did_you_mean
from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.launching.launcher import Request, launch, make_plan
from megatron_vlm.runtime.launching.slurm import Surroundings


def build_parser() -> CommandLine:
    parser = CommandLine(__doc__)
    parser.add_argument("-J", "--job-name", help="needed for SLURM; %%t becomes the time")
    parser.add_argument("-m", "--mode", default="train", help="train, eval, test: a folder of runs/ (default train)")
    parser.add_argument("-t", "--time", help="limit: HH:MM:SS, D-HH:MM:SS, MM, ... (SLURM's forms; there 4:00:00)")
    parser.add_argument("-N", "--nodes", type=whole_number(1), default=1, help="default 1")
    parser.add_argument("--gpus-per-node", type=whole_number(0), default=8, help="default 8; 0: do not ask SLURM")
    parser.add_argument("-A", "--account", help="default: VILA_SLURM_ACCOUNT")
    parser.add_argument("-p", "--partition", help="default: VILA_SLURM_PARTITION")
    parser.add_argument("--slurm-option", action="append", default=[], metavar="=--OPTION=VALUE", help="any other")
    parser.add_argument("--batch", action="store_true", help="submit with sbatch and return")
    parser.add_argument("--local", action="store_true", help="without SLURM")
    parser.add_argument("--requeue", action="store_true", help="in a batch script: requeue its job at the time limit")
    parser.add_argument("--max-restarts", "--max-retry", type=whole_number(0), help="default 3 for mode train, else 0")
    parser.add_argument("--quick-seconds", type=whole_number(0), default=60, help="default 60; 0: never give up early")
    parser.add_argument("--save-seconds", type=whole_number(1), default=120, help="before the limit (default 120)")
    parser.add_argument("--output-dir", help="default runs/MODE/NAME")
    parser.add_argument(
        "--ranks", type=number_of_ranks, metavar="N", help="run so many of the command; auto, gpu, cpu: one each"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and end")
    parser.add_argument("command", nargs="...", metavar="-- COMMAND", help="what to run, with its arguments")
    return parser


def number_of_ranks(text: str) -> str:
    """The number of ranks: a whole number from 1, or `auto`, `gpu` or `cpu`, as torchrun calls them."""
    return text if text in ("auto", "gpu", "cpu") else str(whole_number(1)(text))


def of_ranks(words: list[str]) -> list[str]:
    """The arguments of Python for a command of ours, or a script. Raises ConfigError where it is neither."""
    if words and words[0] in COMMANDS:
        return [*command_words(words[0]), *words[1:]]
    if words and not words[0].startswith("-") and not Path(words[0]).exists():
        hint = did_you_mean(words[0], COMMANDS, f"needs a Python script or one of {', '.join(COMMANDS)}")
        raise ConfigError(f"command: found {words[0]!r}, which is not a file; with --ranks, {hint}")
    return words


def main() -> None:
    surroundings = Surroundings()  # before libraries are quieted by variables: the command decides that for itself
    with build_parser().run() as (arguments, _):
        options = vars(arguments)
        dry_run, command = options.pop("dry_run"), options.pop("command")
        del options["debug"]
        words = command[1:] if command[:1] == ["--"] else command
        request = Request(
            command=tuple(words if arguments.ranks is None else of_ranks(words)),
            launcher=(sys.executable, *command_words("launch")),
            slurm_options=tuple(options.pop("slurm_option")),
            **options,
        )
        plan = make_plan(request, surroundings)
        if dry_run:
            print(plan.shell_line())
            return
        sys.exit(launch(plan, request.requeue, surroundings))


if __name__ == "__main__":
    main()
