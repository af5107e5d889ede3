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

from . import checkpoint
from .beam import Beams
from .chat import BEGIN, Chat, load_tokenizer
from .config import VLConfig, from_file
from .generate import generate
from .sampling import Sampling
from .text import CausalLM

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
@click.option(
    "--checkpoint", "directory", type=click.Path(path_type=Path), required=True, help="A directory."
)
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
@click.option("--top-k", type=int, help="Sample among the K likeliest; needs --temperature.")
@click.option(
    "--top-p", type=float, help="Sample among the likeliest of probability P together; needs --temperature."
)
@click.option("--seed", type=int, help="Of sampling.")
@click.option(
    "--beams",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Beam search; not with --temperature.",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=("cpu",),
    show_default=True,
    help="cpu, cuda:0, …; several take the layers in this order.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="The checkpoint's without it.")
@click.option("--int8", is_flag=True, help="Weights of the layers in int8.")
@click.option(
    "--chunk", type=click.IntRange(1), default=4096, show_default=True, help="Of the prefill, in tokens."
)
@click.option("--backend", default="auto", show_default=True, help="reference, cpu, triton or cuda.")
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
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    beams: int,
    devices: Sequence[str],
    dtype: str | None,
    int8: bool,
    quiet: bool,
    **rest: Any,
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if beams > 1 and temperature > 0:
        raise ValueError("generate: expected --beams or --temperature, got both")
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    request = Request(directory, texts, images, system, raw)
    longest = max(map(len, request.ids))
    if min(map(len, request.ids)) == 0:
        raise ValueError("--prompt: expected some text, got an empty prompt")
    model: Any = checkpoint.load(
        directory, devices=devices, dtype=DTYPES.get(dtype or ""), int8=int8, progress=not quiet, tokens=longest + rest["max_new_tokens"],
        sequences=len(texts) * beams,
    )  # fmt: skip
    inputs: dict[str, Any] = {"prompts": request.ids}
    if request.pictures:
        with torch.no_grad():
            inputs = {"inputs_embeds": model.embed(torch.tensor(request.ids), request.pictures)}
    text_model: CausalLM = getattr(model, "language_model", model)
    streamed = len(texts) == 1 and beams == 1
    stream = Stream(request.tokenizer.decode, lambda text: click.echo(text, nl=False))
    click.echo(request.before(0) if streamed else "", nl=False)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("prefill", total=longest)

        def on_chunk(done: int) -> None:
            progress.update(task, completed=done)
            if done == longest:
                progress.stop()

        outputs = generate(
            text_model,
            **inputs,
            method=Beams(beams) if beams > 1 else sampling,
            generator=None if seed is None else torch.Generator(devices[-1]).manual_seed(seed),
            on_tokens=(lambda step: stream.put(step[0])) if streamed else None,
            on_chunk=on_chunk,
            **rest,
        )
    if streamed:
        stream.end()
        click.echo()
        return
    for i, tokens in enumerate(outputs):
        click.echo("\n" * (i > 0) + request.before(i) + request.tokenizer.decode(tokens))


class Request:
    """Prompts as token ids, by the chat template if there is one and they are not to be taken `raw`."""

    def __init__(
        self, directory: Path, texts: Sequence[str], images: Sequence[Path], system: str | None, raw: bool
    ) -> None:
        config = from_file(directory)
        if images and len(texts) > 1:
            raise ValueError(f"generate: expected one --prompt with --image, got {len(texts)}")
        if images and not isinstance(config, VLConfig):
            raise ValueError(f"generate: expected a checkpoint of MiniMax-VL-01 for --image, got {directory}")
        self.tokenizer, self.texts = load_tokenizer(directory), texts
        self.templated = not raw and self.tokenizer.token_to_id(BEGIN) is not None
        if not self.templated and (system or images):
            raise ValueError(
                "generate: expected a tokenizer with the chat template for --system and --image, without --raw"
            )
        self.pictures: list[Any] = []
        if not self.templated:
            self.ids = [self.tokenizer.encode(text).ids for text in texts]
            return
        from .image import ImageProcessor, image_tokens  # needs Pillow, which text does not

        tokens: Callable[[int, int], int] = image_tokens
        if images:
            file = directory / "preprocessor_config.json"
            processor = ImageProcessor.from_file(file) if file.is_file() else ImageProcessor()
            self.pictures, tokens = list(processor(list(images))), processor.tokens
        chat, heads = (
            Chat(self.tokenizer, tokens=tokens),
            [{"role": "system", "content": system}] if system else [],
        )
        items = [{"type": "image"} for _ in images]
        turns = [{"role": "user", "content": [*items, {"type": "text", "text": text}]} for text in texts]
        self.ids = [chat.encode([*heads, turn], [p.size for p in self.pictures]) for turn in turns]

    def before(self, i: int) -> str:
        """What is shown before a continuation: the prompt that it goes on from."""
        return "" if self.templated else self.texts[i]


if __name__ == "__main__":
    main()
