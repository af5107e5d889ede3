"""Reference models of MiniMax-Text-01 and MiniMax-VL-01, built from the public names of `lightning_attn` and PyTorch."""
