"""`megatron-vlm generate` as a script of the checkout."""

from megatron_vlm.cli.generate import main

if __name__ == "__main__":
    main()
