"""`megatron-vlm show-layout` as a script of the checkout."""

from megatron_vlm.cli.show_layout import main

if __name__ == "__main__":
    main()
