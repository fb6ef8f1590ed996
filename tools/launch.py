"""`megatron-vlm launch` as a script of the checkout."""

from megatron_vlm.cli.launch import main

if __name__ == "__main__":
    main()
