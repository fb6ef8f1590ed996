"""`megatron-vlm train` as a script of the checkout."""

from megatron_vlm.cli.train import main

if __name__ == "__main__":
    main()
