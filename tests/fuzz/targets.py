"""One function a format: bytes in, nothing out. What a user may cause is a TabstopError; all else is our bug."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType

import msgspec

from tabstop.api.dialects import dialect_routes
from tabstop.api.endpoints import Generating
from tabstop.api.fields import Caller
from tabstop.api.schema import decode_body
from tabstop.bench.sse import EventParser
from tabstop.call import Call
from tabstop.checkpoint import Checkpoint, open_checkpoint
from tabstop.config import EngineConfig
from tabstop.encoding import PromptPolicy, encode_prompts, make_sampling
from tabstop.engine import wire
from tabstop.engine.build import build_core
from tabstop.engine.core import EngineCore
from tabstop.engine.door import Door
from tabstop.engine.process import EngineProcess
from tabstop.errors import CheckpointError, TabstopError, UnsupportedModelError
from tabstop.models import gguf_metadata
from tabstop.models.config import read_model_config
from tabstop.models.safetensors_header import read_headers
from tabstop.text import ModelText, load_text
from tabstop.text.chat import ChatTemplate, Conversation, RenderLimits
from tabstop.text.gguf_vocabulary import tokenizer_json
from tabstop.types import Abort, EngineInfo
from tests import tiny

MAX_STEPS = 30
refusals: list[str] = []
"""What users were told since somebody emptied it; the last ones."""


class allowed(contextlib.suppress):
    """Errors that a user may cause; their messages are kept in `refusals`."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            refusals[:] = [*refusals[-20:], str(error)]
        return super().__exit__(kind, error, trace)


CALLER = Caller("fuzz", "", {})
LIMITS = RenderLimits(num_characters=1 << 18, seconds=0.5)
INFO = EngineInfo("tiny", "Llama", 512, tiny.VOCAB_SIZE, 16, 64, 8)
CALLS: list[tuple[type[msgspec.Struct], Callable[..., Call]]] = [
    (route.body, route.endpoint.make_call)
    for route in dialect_routes()
    if route.body is not None and isinstance(route.endpoint, Generating)
]


@cache
def _scratch() -> Path:
    """A folder of this process, in memory where there is such a place."""
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@cache
def _model() -> Path:
    return tiny.tiny_llama(_scratch() / "model")


@cache
def _text() -> ModelText:
    return load_text(Checkpoint("tiny", folder=_model()))


def gguf(data: bytes) -> None:
    """A file's head, and all that is read from it before weights are."""
    path = _scratch() / "model.gguf"
    path.write_bytes(data)
    with allowed(CheckpointError, UnsupportedModelError):
        checkpoint = open_checkpoint(str(path))
        with allowed(CheckpointError, UnsupportedModelError):
            tokenizer_json(checkpoint.gguf_metadata)
        _ = checkpoint.generation_config, checkpoint.tokenizer_config
        gguf_metadata.hub_tensors(checkpoint.gguf_header)
        _ = checkpoint.eos_token_ids
        read_model_config(checkpoint)


def safetensors(data: bytes) -> None:
    """A file's head; tensors that it places must lie in the file."""
    folder = _scratch() / "safetensors"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    with allowed(CheckpointError, UnsupportedModelError):
        for name, entry in read_headers(folder).items():
            assert entry.offset >= 0 and entry.offset + entry.info.num_bytes <= len(data), name


def config(data: bytes) -> None:
    """config.json, from JSON to the numbers that a model is built by."""
    folder = _scratch() / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(data)
    with allowed(CheckpointError, UnsupportedModelError):
        checkpoint = open_checkpoint(str(folder))
        _ = checkpoint.eos_token_ids
        read_model_config(checkpoint)


def template(data: bytes) -> None:
    """A chat template over two conversations, with ids and as text. Bounded in time and size."""
    conversations = [
        Conversation([{"role": "user", "content": "def f"}]),
        Conversation(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "x <|im_end|>"},
                {"role": "assistant", "content": "return"},
            ],
            continue_final_message=True,
        ),
    ]
    with allowed(TabstopError):
        made = ChatTemplate(data.decode("utf-8", "replace"), {"eos_token": "<|im_end|>"}, LIMITS)
        for conversation in conversations:
            with allowed(TabstopError):
                made.render(conversation)
            with allowed(TabstopError):
                made.encode(_text().tokenizer, conversation)


def body(data: bytes) -> None:
    """A request body: the first byte says of which dialect. From JSON to token ids and sampling parameters."""
    kind, make_call = CALLS[data[0] % len(CALLS)] if data else CALLS[0]
    with allowed(TabstopError):
        call = make_call(decode_body(data[1:], kind), CALLER)
        make_sampling(call, _text(), INFO.vocab_size, 0)
        encode_prompts(call, _text(), INFO, PromptPolicy())


def events(data: bytes) -> None:
    """An event stream as `tabstop bench` reads it: however it is cut, the events are the same."""
    whole = list(EventParser().feed(data))
    parser, pieces = EventParser(), []
    for index in range(len(data)):
        pieces += parser.feed(data[index : index + 1])
    assert pieces == whole


class Engine:
    """The engine's loop over a real core, its socket replaced by the bytes that would arrive."""

    def __init__(self) -> None:
        options = EngineConfig(model=str(_model()), offline=True, num_kv_blocks=64, max_num_seqs=4, num_threads=1)
        self.core: EngineCore = build_core(options)
        self.door = Door(wire.address(_scratch()))
        self.process = EngineProcess(self.door, None, 0)  # type: ignore[arg-type]
        self.process.core = self.core
        self.now = 0.0

    def take(self, frame: bytes) -> None:
        """One frame of client 1; then steps until nothing is left of it."""
        letter = self.door._open([b"1", frame])
        if letter is None:
            return
        self.process._handle(letter)
        pending = None
        for _ in range(MAX_STEPS):
            pending = self._step(pending)
        for request_id in list(self.process.open):
            self.core.abort(Abort(request_id))
        while pending is not None or self.core.has_work():
            pending = self._step(pending)
        assert not self.process.open, "a request has not ended"

    def _step(self, pending: object) -> object:
        self.now += 0.01
        pending, deltas = self.core.step(pending, self.now)  # type: ignore[arg-type]
        self.process.deliver(deltas)
        self.core.check()
        return pending


@cache
def _engine() -> Engine:
    return Engine()


def frame(data: bytes) -> None:
    """A frame to the engine, taken as if a front end had sent it; and one from the engine."""
    with allowed(msgspec.DecodeError):
        wire.decode_from_engine(data)
    _engine().take(data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "gguf": gguf,
    "safetensors": safetensors,
    "config": config,
    "template": template,
    "body": body,
    "events": events,
    "frame": frame,
}
