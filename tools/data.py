"""`megatron-vlm data` as a script of the checkout."""

from megatron_vlm.cli.data import main

if __name__ == "__main__":
    main()
