"""Trains a recipe.

megatron-vlm launch --local --ranks N -- train RECIPE.yaml [section.key=value ...]
megatron-vlm train RECIPE.yaml [section.key=value ...]          (one process)

With --check-layout nothing is trained: the recipe, shrunk, is run in its layout and by one process, in seconds, and the
first tensor that differs is named.
"""

from megatron_vlm.errors import shown
from megatron_vlm.runtime.command_line import CommandLine
from megatron_vlm.runtime.signals import StopSignals
from megatron_vlm.runtime.waiting import LIBRARIES, told_if_slow

CHILDREN_NEED = ("megatron_vlm.data.fetch.loader", "megatron_vlm.checkpoint.writing")


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("recipe", help="a YAML recipe, see examples/recipes")
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--check-layout", action="store_true", help="compare this layout with one process instead")
    with parser.run() as (arguments, launch), StopSignals(launch) as signals:
        from megatron_vlm.config import load_config
        from megatron_vlm.runtime.device import prepare, set_variables
        from megatron_vlm.runtime.fork_server import start_forked

        config = load_config(arguments.recipe, arguments.overrides)  # tells unreadable keys, before torch is imported
        if not arguments.check_layout and (config.data.num_workers or config.checkpoint.async_save):
            set_variables(config.runtime.device)
            start_forked(CHILDREN_NEED, signals)
        with told_if_slow(LIBRARIES):
            device = prepare(config.runtime.device, launch.local_world_size)
            from megatron_vlm.runtime.distributed import init_world, teardown
        init_world(launch, device, config.runtime.timeout_seconds)
        if arguments.check_layout:
            with told_if_slow(LIBRARIES):
                from megatron_vlm.training.layout_check.check import check_layout
            with told_if_slow("running the shrunk recipe in its layout and by one process"):
                report = check_layout(config, launch)
            if launch.rank == 0 and report.comparisons:
                print(shown(report.table()), flush=True)
            report.raise_on_fault()
        else:
            with told_if_slow(LIBRARIES):
                from megatron_vlm.training.loop import train
            train(config, launch, signals)
        teardown()


if __name__ == "__main__":
    main()
