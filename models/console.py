"""The command line of `python -m models.generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from . import checkpoint
from .beam import Beams
from .chat import BEGIN, Chat, load_tokenizer
from .config import VLConfig, from_file
from .generate import generate
from .sampling import Sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Stream:
    """Decodes tokens as they come: text is written once no later token can change it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], Any]) -> None:
        self.decode, self.write = decode, write
        self.tokens: list[int] = []
        self.shown = ""

    def put(self, token: int | None) -> None:
        if token is not None:
            self.tokens.append(token)
            text = self.decode(self.tokens)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of a letter is still to come
                self._show(text)

    def end(self) -> None:
        self._show(self.decode(self.tokens))

    def _show(self, text: str) -> None:
        self.write(text[len(self.shown) :])
        self.shown = text


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--checkpoint", "directory", type=click.Path(path_type=Path), required=True)
@click.option(
    "--prompt", "prompts", multiple=True, required=True, help="Several make a batch; - reads standard input."
)
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="Of one prompt, in order."
)
@click.option("--system", help="System prompt of the chat template.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--max-new-tokens", type=click.IntRange(0), default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the likeliest token.")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--seed", type=int, help="Of sampling.")
@click.option("--beams", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--device", "devices", multiple=True, default=("cpu",), show_default=True, help="Layers in this order."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="The checkpoint's without it.")
@click.option("--int8", is_flag=True, help="Weights of the layers in int8.")
@click.option(
    "--chunk", type=click.IntRange(1), default=4096, show_default=True, help="Of the prefill, in tokens."
)
@click.option("--backend", default="auto", show_default=True)
@click.option("--quiet", is_flag=True, help="No progress bars.")
def main(**options: Any) -> None:
    """Continues prompts with a checkpoint, by the chat template if its tokenizer has one.

    One prompt is streamed; several are written one after the other, with a line between them.
    """
    try:
        _run(**options)
    except (ValueError, TypeError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _run(
    directory: Path,
    prompts: Sequence[str],
    images: Sequence[Path],
    system: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    beams: int,
    devices: Sequence[str],
    dtype: str | None,
    int8: bool,
    chunk: int,
    backend: str,
    quiet: bool,
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if beams > 1 and temperature > 0:
        raise ValueError("generate: expected --beams or --temperature, got both")
    if images and len(prompts) > 1:
        raise ValueError(f"generate: expected one --prompt with --image, got {len(prompts)}")
    config = from_file(directory)
    if images and not isinstance(config, VLConfig):
        raise ValueError(f"generate: expected a checkpoint of MiniMax-VL-01 for --image, got {directory}")
    tokenizer = load_tokenizer(directory)
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    templated = not raw and tokenizer.token_to_id(BEGIN) is not None
    if not templated and (system or images):
        raise ValueError(
            "generate: expected a tokenizer with the chat template for --system and --image, without --raw"
        )
    processed: list[Any] = []
    if images:
        from .image import ImageProcessor

        file = directory / "preprocessor_config.json"
        processor = ImageProcessor.from_file(file) if file.is_file() else ImageProcessor()
        processed = processor(list(images))
        chat = Chat(tokenizer, tokens=processor.tokens)
    elif templated:
        chat = Chat(tokenizer)
    if templated:
        heads = [{"role": "system", "content": system}] if system else []
        pictures = [{"type": "image"} for _ in processed]
        asked = [
            [*heads, {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]
            for text in texts
        ]
        ids = [chat.encode(messages, [image.size for image in processed]) for messages in asked]
    else:
        ids = [tokenizer.encode(text).ids for text in texts]
    model = checkpoint.load(
        directory, devices=devices, dtype=DTYPES.get(dtype or ""), int8=int8, progress=not quiet, tokens=max(map(len, ids)),
        sequences=len(ids) * beams,
    )  # fmt: skip
    inputs: dict[str, Tensor | list[list[int]]] = {"prompts": ids}
    if isinstance(config, VLConfig):
        if images:
            with torch.no_grad():
                inputs = {"inputs_embeds": model.embed(torch.tensor(ids), processed)}
        model = model.language_model
    generator = None if seed is None else torch.Generator(devices[-1]).manual_seed(seed)
    streamed = len(ids) == 1 and beams == 1
    stream = Stream(tokenizer.decode, lambda text: click.echo(text, nl=False))
    if streamed and not templated:
        click.echo(texts[0], nl=False)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("prefill", total=max(map(len, ids)))

        def on_chunk(done: int) -> None:
            progress.update(task, completed=done)
            if done == max(map(len, ids)):
                progress.stop()

        outputs = generate(
            model,
            **inputs,  # type: ignore[arg-type]
            max_new_tokens=max_new_tokens,
            method=Beams(beams) if beams > 1 else sampling,
            generator=generator,
            on_tokens=(lambda step: stream.put(step[0])) if streamed else None,
            chunk=chunk,
            on_chunk=on_chunk,
            backend=backend,
        )
    if streamed:
        stream.end()
        click.echo()
        return
    for i, (text, tokens) in enumerate(zip(texts, outputs, strict=True)):
        click.echo("\n" * (i > 0) + ("" if templated else text) + tokenizer.decode(tokens))
