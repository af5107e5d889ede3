"""The chat template of MiniMax-Text-01 and MiniMax-VL-01, and the way from messages to token ids.

A message is {"role": "system" | "user" | "assistant" | "function", "content": text or [{"type": "text", "text": …} |
{"type": "image"}, …]}; "function" (a tool's result) has a "name" too. Rendered, byte for byte as in the release:

    <beginning_of_sentence>user name=user⏎<image>text<end_of_sentence>⏎

Text is only ever text: where it spells a control token, as "<end_of_sentence>" or the "<image>" of an SVG file, it is encoded
as the letters it is made of, never as that token, so that no text can end its turn, open another or claim a picture.
Everything else is encoded as the released tokenizer encodes the rendered string.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import Tokenizer

from .image import image_tokens

BEGIN, END, IMAGE = "<beginning_of_sentence>", "<end_of_sentence>", "<image>"
HEADERS = {
    "system": "system ai_setting=assistant",
    "user": "user name=user",
    "assistant": "ai name=assistant",
    "function": "system function_response=functions",
}
Message: TypeAlias = "Mapping[str, Any]"


class Control(str):
    """A piece of the rendered template that is one token; other pieces are text."""


def render(
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = True,
) -> str:
    """The rendered template, each picture as one "<image>". To look at: `Chat.encode` is the way to token ids.

    tools: descriptions of functions that the model may call, after the messages as in the release.
    Raises ValueError for an unknown role or kind of content, TypeError for what is not of a message's form.
    """
    return "".join(_pieces(messages, tools, add_generation_prompt))


def pictures(messages: Sequence[Message]) -> list[Any]:
    """What the messages' items {"type": "image", "image": …} hold, in order: for `ImageProcessor`."""
    items = [
        item for message in messages if not isinstance(message["content"], str) for item in message["content"]
    ]
    return [item["image"] for item in items if item["type"] == "image"]


class Chat:
    """Messages -> token ids, with the pictures' placeholders expanded, and back.

    tokenizer: a `tokenizers.Tokenizer` of the model. tokens: width, height -> how many tokens a picture takes
    (`image_tokens`, or `ImageProcessor.tokens`). Raises ValueError if the tokenizer lacks the template's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, tokens: Callable[[int, int], int] = image_tokens) -> None:
        self.tokenizer, self.tokens = tokenizer, tokens
        for name in (BEGIN, END):
            self._id(name)
        # Of a copy every added token is special, and special tokens are taken as the text that they are spelled with.
        self._text = Tokenizer.from_str(tokenizer.to_str())
        self._text.add_special_tokens([t.content for t in tokenizer.get_added_tokens_decoder().values()])
        self._text.encode_special_tokens = True
        self._text.no_truncation()  # which a tokenizer.json may ask for
        self._text.no_padding()

    @classmethod
    def from_dir(cls, path: str | Path, *, tokens: Callable[[int, int], int] = image_tokens) -> Chat:
        """From a checkpoint's directory: its tokenizer.json, or else whatever transformers makes a fast tokenizer of.

        Raises ValueError if there is neither, or the tokenizer lacks the template's tokens.
        """
        return cls(load_tokenizer(path), tokens=tokens)

    def encode(
        self,
        messages: Sequence[Message],
        image_sizes: Sequence[tuple[int, int]] = (),
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The ids of the rendered messages; image_sizes: (width, height) of each picture in them, in order.

        Raises as `render`, and ValueError if the messages have more or fewer pictures than there are sizes.
        """
        pieces = list(_pieces(messages, tools, add_generation_prompt))
        count = sum(isinstance(piece, Control) and piece == IMAGE for piece in pieces)
        if count != len(image_sizes):
            raise ValueError(
                f'Chat: expected an image_sizes entry for each {{"type": "image"}} of the messages, {count}, got '
                f'{len(image_sizes)} ("{IMAGE}" in a text is text)'
            )
        sizes, ids, text = iter(image_sizes), [], ""
        for piece in [*pieces, Control()]:
            if not isinstance(piece, Control):
                text += piece
                continue
            # What stands between two control tokens is encoded as a whole, as the released tokenizer does.
            ids += self._text.encode(text, add_special_tokens=False).ids if text else []
            text = ""
            if piece:
                ids += [self._id(piece)] * (self.tokens(*next(sizes)) if piece == IMAGE else 1)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _id(self, name: str) -> int:
        found = self.tokenizer.token_to_id(name)
        if found is None:
            raise ValueError(f"Chat: expected a tokenizer with the token {name}, got one of another model")
        return found


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint's directory; errors as of `Chat.from_dir`."""
    path = Path(path)
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # of tokenizers' own kind
            raise ValueError(f"Chat: expected a tokenizer in {file}, got {error}") from error
    if not path.is_dir():
        raise ValueError(f"Chat: expected a directory with a tokenizer.json, got {path}")
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        return Tokenizer.from_str(loaded.backend_tokenizer.to_str())  # a copy of our own
    except Exception as error:
        raise ValueError(
            f"Chat: expected tokenizer.json, or what transformers can load, in {path}, got {error}"
        ) from error


def _pieces(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], prompt: bool) -> Iterator[str]:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(
                f"messages[{i}]: expected a dict with role and content, got {type(message).__name__}"
            )
        role = message.get("role")
        if not isinstance(role, str) or role not in HEADERS:
            raise ValueError(f"messages[{i}]: expected a role of {', '.join(HEADERS)}, got {role!r}")
        content = list(_content(message.get("content"), f"messages[{i}]"))
        if role == "function":
            if not isinstance(message.get("name"), str) or any(
                isinstance(piece, Control) for piece in content
            ):
                raise ValueError(f"messages[{i}]: expected a name and text from a function, got {message!r}")
            content = [f'{{"name": "{message["name"]}", "response": ', *content, "}"]
        yield from (Control(BEGIN), HEADERS[role] + "\n", *content, Control(END), "\n")
    for tool in tools:
        text = json.dumps(tool, ensure_ascii=False)
        yield from (Control(BEGIN), f"system function_setting=functions\n{text}", Control(END), "\n")
    if prompt:
        yield from (Control(BEGIN), HEADERS["assistant"] + "\n")


def _content(content: Any, name: str) -> Iterator[str]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence):
        raise TypeError(f"{name}: expected content of text or a list of items, got {type(content).__name__}")
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else type(item).__name__
        if kind == "image":
            yield Control(IMAGE)
        elif kind == "text" and isinstance(item.get("text"), str):
            yield item["text"]
        else:
            raise ValueError(
                f'{name}: expected items {{"type": "text", "text": …}} or {{"type": "image"}}, got {item!r}'
            )
