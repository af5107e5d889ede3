"""train_tiny, generate and long_context, from the command line."""

import json
import math
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from models_support import randomize, relative, tiny_config, tokens, turn_half

from models import checkpoint, console, long_context, train_tiny
from models.byte_tokenizer import byte_tokenizer
from models.chat import BEGIN, END
from models.console import Stream
from models.text import CausalLM
from models.training import start, train


def call(main: object, *args: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], input=stdin)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object], str]:
    """A checkpoint of a few steps, its record and what was printed."""
    directory = tmp_path_factory.mktemp("tiny")
    files = (
        "--out",
        directory / "checkpoint",
        "--json",
        directory / "curve.json",
        "--plot",
        directory / "curve.png",
    )
    result = call(train_tiny.main, "--steps", 12, *files)
    assert result.exit_code == 0, result.output
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    return directory / "checkpoint", json.loads((directory / "curve.json").read_text()), result.output


def test_training_learns(trained: tuple[Path, dict[str, object], str]) -> None:
    """From eight bits per byte; what is printed is what is recorded. The whole run is in benchmarks/results."""
    _, record, output = trained
    curve = record["bits_per_byte"]
    assert isinstance(curve, list) and len(curve) == 12 and 7.5 < curve[0] < 9 and curve[-1] < 6.8
    assert f"{record['held_out_bits_per_byte']:.3f} bits per byte" in output
    assert record["parameters"] == sum(
        p.numel() for p in CausalLM(train_tiny.CONFIG, device="meta").parameters()
    )


def test_training_repeats(trained: tuple[Path, dict[str, object], str]) -> None:
    """The same seed, the same curve."""
    _, record, _ = trained
    curve = record["bits_per_byte"]
    training, _ = train_tiny.read_bytes(None)
    recipe = train_tiny.Recipe(steps=12)
    with train_tiny.Progress(disable=True) as progress:
        run = start(train_tiny.CONFIG, recipe)
        train(run, recipe, training, progress)
    assert [round(b, 4) for b in run.curve] == curve


def test_whoever_reads_the_config_reads_the_weights(trained: tuple[Path, dict[str, object], str]) -> None:
    modes = {file.stat().st_mode for file in trained[0].iterdir()}
    assert len(modes) == 1, "files of one checkpoint, as the umask has them"


def test_committed_curve_reaches_its_goal() -> None:
    """The run of `python -m models.train_tiny` that the README shows: below 2.6 bits per byte, in under six minutes."""
    file = Path(__file__).parent.parent / "benchmarks" / "results" / "train_tiny.json"
    record = json.loads(file.read_text())
    assert record["held_out_bits_per_byte"] < 2.6 and record["seconds"] < 360
    assert record["recipe"] == json.loads(json.dumps(train_tiny.asdict(train_tiny.Recipe())))
    assert len(record["bits_per_byte"]) == record["recipe"]["steps"]


@torch.no_grad()
def test_transformers_loads_the_checkpoint(trained: tuple[Path, dict[str, object], str]) -> None:
    transformers = pytest.importorskip("transformers")
    directory, *_ = trained
    model = checkpoint.load(directory)
    config = transformers.MiniMaxConfig(**model.config.to_transformers())
    theirs, info = transformers.MiniMaxForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float32, output_loading_info=True
    )
    derived = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    assert not info["unexpected_keys"] and all(k.endswith(derived) for k in info["missing_keys"])
    turn_half(theirs, model.config)
    ids = tokens(2, 90, vocab=256)
    assert relative(model(ids), theirs.eval()(ids, use_cache=False).logits) < 1e-5


def test_generate_continues(trained: tuple[Path, dict[str, object], str]) -> None:
    """Greedily, as uncached; several prompts as each alone; from standard input; by beams and by sampling."""
    directory, *_ = trained
    base = ("--checkpoint", directory, "--max-new-tokens", 12, "--chunk", 3)
    first = call(console.main, *base, "--prompt", "def test")
    assert first.exit_code == 0, first.output
    model, ids = checkpoint.load(directory), list(b"def test")
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert first.stdout == byte_tokenizer().decode(ids) + "\n"
    both = call(console.main, *base, "--prompt", "def test", "--prompt", "import os")
    second = call(console.main, *base, "--prompt", "-", stdin="import os")
    assert both.stdout == first.stdout + "\n" + second.stdout
    drawn = [
        call(console.main, *base, "--prompt", "x", "--temperature", 2, "--seed", seed).stdout
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    beams = call(console.main, *base, "--prompt", "def test", "--beams", 3)
    assert beams.exit_code == 0 and beams.stdout.startswith("def test")
    small = call(console.main, *base, "--prompt", "def test", "--int8", "--dtype", "bfloat16")
    assert small.exit_code == 0 and small.stdout.startswith("def test"), small.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt", ""), "expected some text"),
        (("--prompt", "a", "--temperature", "1", "--beams", "2"), "expected --beams or --temperature"),
        (("--prompt", "a", "--top-k", "3"), "temperature > 0 with top_k"),
        (("--prompt", "a", "--image", "cat.png"), "expected a checkpoint of MiniMax-VL-01"),
        (("--prompt", "a", "--system", "be kind"), "chat template"),
        (("--prompt", "a", "--backend", "quantum"), "quantum"),
        (("--prompt", "a", "--device", "abacus"), "abacus"),
    ],
)
def test_generate_errors(
    trained: tuple[Path, dict[str, object], str], args: tuple[str, ...], message: str
) -> None:
    result = call(console.main, "--checkpoint", trained[0], *args)
    assert result.exit_code == 1 and message in result.output and "Traceback" not in result.output


def test_generate_with_a_picture(tmp_path: Path) -> None:
    """The chat template, a picture's placeholders and the model of a VL checkpoint, as by hand."""
    from PIL import Image
    from tokenizers import AddedToken

    from models.chat import Chat
    from models.config import VisionConfig, VLConfig
    from models.image import ImageProcessor
    from models.vl import VLForConditionalGeneration

    special = [BEGIN, END, "<image>"]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name) for name in special])
    vision = VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28
    )
    grid = ((28, 28), (56, 28), (28, 56))
    config = VLConfig(
        text=tiny_config(0, vocab_size=300), vision=vision, image_token_id=258, image_grid_pinpoints=grid
    )
    model = VLForConditionalGeneration(config).eval()
    randomize(model)
    checkpoint.save(model, tmp_path, progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    fields = {"size": [28, 28], "image_grid_pinpoints": [list(size) for size in grid], "patch_size": 14}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    Image.effect_mandelbrot((60, 30), (-2, -1, 1, 1), 20).save(tmp_path / "picture.png")
    base = ("--checkpoint", tmp_path, "--prompt", "what?", "--max-new-tokens", 6, "--system", "see")
    result = call(console.main, *base, "--image", tmp_path / "picture.png")
    assert result.exit_code == 0, result.output
    processor = ImageProcessor.from_file(tmp_path)
    picture = processor(tmp_path / "picture.png")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    messages = [{"role": "system", "content": "see"}, turn]
    ids = Chat.from_dir(tmp_path, tokens=processor.tokens).encode(messages, [picture.size])
    with torch.no_grad():
        x, new = model.embed(torch.tensor([ids]), [picture]), []
        for _ in range(6):
            new.append(int(model(inputs_embeds=x)[0, -1].argmax()))
            x = torch.cat([x, model.language_model.model.embed_tokens(torch.tensor([new[-1:]]))], 1)
    assert result.stdout == tokenizer.decode(new) + "\n"
    for args, message in (
        (("--raw",), "chat template"),
        (("--prompt", "b"), "one --prompt"),
        (("--image", tmp_path / "tokenizer.json"), "tokenizer.json: expected a picture"),
        (("--image", tmp_path / "none.png"), "none.png"),
    ):
        wrong = call(console.main, *base, "--image", tmp_path / "picture.png", *args)
        assert wrong.exit_code == 1 and message in wrong.output, wrong.output


def test_generate_without_a_checkpoint(tmp_path: Path) -> None:
    result = call(console.main, "--checkpoint", tmp_path, "--prompt", "a")
    assert result.exit_code == 1 and "config.json" in result.output


def test_streamed_text_is_whole_letters() -> None:
    """No half of a letter is written; broken bytes at the end are shown as such."""
    text = "naïve 日本語 🙂 end"
    pieces: list[str] = []
    stream = Stream(byte_tokenizer().decode, pieces.append)
    for token in [*text.encode(), 0xF0, 0x9F]:
        stream.put(token)
    stream.put(None)
    assert "".join(pieces) == text and "�" not in "".join(pieces)
    stream.end()
    assert "".join(pieces).startswith(text) and "�" in pieces[-1]


def test_byte_tokenizer() -> None:
    """Every byte of UTF-8 is its own id, whatever text it is in; ids that are no text do not fail."""
    text = "".join(map(chr, range(0x250))) + "日本 🙂\r\n\t"
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text).ids == list(text.encode()) and tokenizer.decode(list(text.encode())) == text
    assert tokenizer.get_vocab_size() == 256 and isinstance(tokenizer.decode(list(range(256))), str)
    assert tokenizer.token_to_id(BEGIN) is None and tokenizer.token_to_id(END) is None


def test_training_text() -> None:
    """Held-out files are no training files; a file's last tenth is held out."""
    training, held_out = train_tiny.read_bytes(None)
    assert len(training) > 4 * len(held_out) > 1e6
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    total = sum(len(f.read_bytes()) for f in [*stdlib.glob("*.py"), *stdlib.glob("[a-z]*/*.py")])
    assert len(training) + len(held_out) <= total


def test_another_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    """It says so before it trains."""
    checkpoint.save(CausalLM(tiny_config(0)), tmp_path)
    result = call(train_tiny.main, "--steps", 1, "--out", tmp_path)
    assert result.exit_code == 2 and "config.json says another" in " ".join(result.output.split())
    assert "training" not in result.output
    for wrong in (("--out", __file__), ("--out", tmp_path / "o", "--json", tmp_path / "none" / "x.json")):
        result = call(train_tiny.main, "--steps", 1, *wrong)
        assert result.exit_code == 2 and "Traceback" not in result.output and "training" not in result.output
    result = call(long_context.main, "--tokens", 9, "--checkpoint", tmp_path / "none")
    assert result.exit_code == 2 and "expected a directory" in " ".join(result.output.split())


def test_own_text(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(bytes(range(200)) * 100)
    training, held_out = train_tiny.read_bytes(file)
    assert torch.cat([training, held_out]).tolist() == list(file.read_bytes()) and len(held_out) == 2000
    file.write_bytes(b"short")
    result = call(train_tiny.main, "--text", file, "--steps", 1, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "bytes at least" in result.output


def test_bits_per_byte_of_an_even_guess() -> None:
    """Eight, for a model that knows nothing."""
    model = CausalLM(train_tiny.CONFIG)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert math.isclose(
        train_tiny.bits_per_byte(model, torch.zeros(3, 20, dtype=torch.uint8)), 8, rel_tol=1e-6
    )


def test_long_context(trained: tuple[Path, dict[str, object], str]) -> None:
    """The cache does not grow, and the states are those of float64, of random and of trained weights."""
    for args in ((), ("--checkpoint", trained[0])):
        result = call(long_context.main, "--tokens", 20000, "--chunk", 1000, "--window", 64, *args)
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert "windows of 64 tokens" in lines[0]
        table = [line.split() for line in lines if re.fullmatch(r" *\d+ +\d+ +[\d.]+ +\d+", line)]
        assert len(table) >= 10 and table[-1][0] == "20000"
        assert len({row[2] for row in table[1:]}) == 1, "bytes of the cache"
        errors = [float(e) for e in re.findall(r"state within (\S+) of float64", result.output)]
        assert len(errors) == 6 and max(errors) < 1e-5


def test_long_context_tells_a_wrong_state(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = long_context.run

    def wrong(*args: object, **rest: object) -> object:
        cache = feed(*args, **rest)  # type: ignore[arg-type]
        cache.states[0][0, 3] *= 1.001
        return cache

    monkeypatch.setattr(long_context, "run", wrong)
    result = call(long_context.main, "--tokens", 500, "--chunk", 100)
    assert result.exit_code == 1 and "within 1e-5 of the float64 recurrence" in result.output
