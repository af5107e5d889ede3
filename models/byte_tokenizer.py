"""A tokenizer whose ids are the bytes of a text, in the format of any other: for the tiny model."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def byte_tokenizer() -> Tokenizer:
    """256 ids and no merges."""
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: byte for byte, letter in enumerate(_letters())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters() -> list[str]:
    """The letter that the byte-level format writes for each byte: itself if it is printed, else one from 256 on."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]
