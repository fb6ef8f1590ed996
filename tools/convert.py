"""`megatron-vlm convert` as a script of the checkout."""

from megatron_vlm.cli.convert import main

if __name__ == "__main__":
    main()
