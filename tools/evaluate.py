"""`megatron-vlm evaluate` as a script of the checkout."""

from megatron_vlm.cli.evaluate import main

if __name__ == "__main__":
    main()
