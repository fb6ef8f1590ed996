"""Trains a recipe.

torchrun --nproc-per-node N tools/train.py RECIPE.yaml [section.key=value ...]
python tools/train.py RECIPE.yaml [section.key=value ...]          (one process)
"""

import argparse

from megatron_vlm.runtime.distributed import fail_together, read_launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML recipe, see examples/recipes")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of one-line errors")
    arguments = parser.parse_args()
    launch = read_launch()
    with fail_together(launch, debug=arguments.debug):
        from megatron_vlm.config import load_config
        from megatron_vlm.runtime.device import prepare
        from megatron_vlm.runtime.distributed import init_world, teardown

        config = load_config(arguments.recipe, arguments.overrides)
        device = prepare(config.runtime.device, launch.local_world_size)
        init_world(launch, device, config.runtime.timeout_seconds)
        from megatron_vlm.training.loop import train

        train(config, launch)
        teardown()


if __name__ == "__main__":
    main()
