"""Trains a recipe.

torchrun --nproc-per-node N tools/train.py RECIPE.yaml [section.key=value ...]
python tools/train.py RECIPE.yaml [section.key=value ...]          (one process)
"""

from megatron_vlm.runtime.command_line import CommandLine


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("recipe", help="a YAML recipe, see examples/recipes")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    with parser.run() as (arguments, launch):
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
