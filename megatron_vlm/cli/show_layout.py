"""Shows what a recipe does on a number of ranks, without running it.

megatron-vlm show-layout examples/recipes/quickstart_phase2.yaml --world-size 8 --html layout.html
megatron-vlm show-layout RECIPE [section.key=value ...] --world-size N [--html FILE] [--json FILE]

Which rank owns which tokens, who encodes which image, what travels between ranks, the pipeline's timeline, the memory
each rank will need: as tables here, and drawn as one page that needs nothing else. No process group, no weights.
"""

from pathlib import Path

from megatron_vlm.runtime.command_line import CommandLine, whole_number
from megatron_vlm.runtime.waiting import told_if_slow


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("recipe", help="a YAML recipe, see examples/recipes")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--world-size", type=whole_number(1), required=True, metavar="N", help="number of ranks")
    parser.add_argument(
        "--ranks-per-node",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="where parallel.context is to be split (default 8)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="the page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    with parser.run() as (arguments, _):
        from megatron_vlm.config import load_config
        from megatron_vlm.runtime.device import prepare

        config, world_size = load_config(arguments.recipe, arguments.overrides), arguments.world_size
        prepare("cpu")  # nothing is computed, so no GPU is touched
        with told_if_slow(f"reading the models of {arguments.recipe}"):
            from megatron_vlm.cli.layout_page.output import show
            from megatron_vlm.training.recipe import resolve_recipe

            resolved = resolve_recipe(config, world_size, min(world_size, arguments.ranks_per_node))
        show(Path(arguments.recipe).stem, resolved.config, resolved.model, arguments)


if __name__ == "__main__":
    main()
