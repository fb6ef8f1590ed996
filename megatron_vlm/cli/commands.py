"""The names of the commands and what each does, in a line. A name becomes the module of it: `show-layout` is
`show_layout.py` beside this one, imported only when it is called."""

PROGRAM = "megatron-vlm"
COMMANDS = {
    "train": "trains a recipe, or compares its layout with one process",
    "generate": "asks a model questions about images",
    "evaluate": "asks a checkpoint a file of questions and scores the answers",
    "convert": "moves weights between formats, compares models, says what a directory holds",
    "show-layout": "shows what a recipe does on a number of ranks, without running it",
    "data": "makes a tokenizer of a data file, for a model from random weights",
    "launch": "runs a command on several ranks, with restarts, here or through SLURM",
    "config": "prints the keys of a recipe: type, default, meaning, rules",
    "doctor": "says what this machine can do, what is missing and what would mend it",
}


def command_words(name: str) -> tuple[str, ...]:
    """The arguments with which Python runs a command, in any environment that has the package: nothing is imported from
    the working directory, which is anybody's."""
    return "-P", "-m", "megatron_vlm", name
