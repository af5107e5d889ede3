"""`python -m lightning_attn` is the console script `lightning-attn`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="lightning-attn")
