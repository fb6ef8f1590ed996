"""`megatron-vlm config` as a script of the checkout."""

from megatron_vlm.cli.config import main

if __name__ == "__main__":
    main()
