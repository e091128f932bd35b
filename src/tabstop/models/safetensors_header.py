"""Reads the heads of safetensors files: which tensors a folder holds, where, and in what type. Knows no torch.

Every length is checked against the file's size, so a truncated download is found before anything is loaded.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabstop.checkpoint import PICKLE_SUFFIXES, pickle_message, read_json
from tabstop.errors import CheckpointError
from tabstop.models import mistral_metadata
from tabstop.models.gguf_header import shown
from tabstop.quant.encodings import ENCODINGS, Encoding, TensorInfo

MAX_HEADER_BYTES = 100 << 20
OTHER_TYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64"), 8),
}
"""Type → bytes of a value, beside the float types of quant/encodings.py."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """Where a tensor lies."""

    path: Path
    info: TensorInfo
    offset: int  # from the start of the file


def read_headers(folder: Path) -> dict[str, HeaderEntry]:
    """Every tensor of a checkpoint folder. Raises CheckpointError, also for a folder with pickle files only."""
    entries: dict[str, HeaderEntry] = {}
    for path in weight_files(folder):
        for name, entry in _read_header(path).items():
            if name in entries:
                raise CheckpointError(f"tensor {name} lies in two files: {entries[name].path.name} and {path.name}")
            entries[name] = entry
    return entries


def weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or the only safetensors file. Raises CheckpointError when there are none."""
    stem = mistral_metadata.WEIGHTS if mistral_metadata.is_own_form(folder) else "model"
    index_path = folder / f"{stem}.safetensors.index.json"
    index = read_json(index_path).get("weight_map")
    if index is not None:
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise CheckpointError(f"{index_path}: weight_map is {shown(index)}; names of files are known")
        names = sorted(set(index.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index_path} names a file outside the folder: {name}")
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} lacks {name}, which its index names; download the checkpoint again")
        return [folder / name for name in names]
    if (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise CheckpointError(f"{folder} holds {len(files)} safetensors files but no model.safetensors.index.json")
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(pickle_message(path))
    raise CheckpointError(
        f"{folder} holds config.json but no weights (*.safetensors); download them, or pass --load-format dummy for "
        "random ones"
    )


def _read_header(path: Path) -> dict[str, HeaderEntry]:
    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged or truncated: {what}; download the file again")

    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise damaged(f"its header of {header_bytes} bytes does not fit into the file")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError):
            raise damaged("its header is no JSON") from None
    if not isinstance(header, dict):
        raise damaged("its header is no JSON object")
    tensors: dict[str, HeaderEntry] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        info, end = _tensor(entry) or (None, 0)
        if info is None:
            raise damaged(f"the entry of tensor {name} is invalid")
        if 8 + header_bytes + end > file_bytes:
            raise damaged(f"tensor {name} would end at byte {8 + header_bytes + end} of {file_bytes}")
        tensors[name] = HeaderEntry(path, info, 8 + header_bytes + end - info.num_bytes)
    return tensors


def _tensor(entry: Any) -> tuple[TensorInfo, int] | None:
    """A header entry → (info, end in the data section), or None when its numbers contradict each other."""
    try:
        dtype, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        encoding = ENCODINGS.get(dtype) or Encoding(dtype, 1, OTHER_TYPES[dtype])
        if any(size < 0 for size in shape) or not 0 <= start <= end:
            return None
        if math.prod(shape) * encoding.block_bytes != end - start:
            return None
    except (KeyError, TypeError, ValueError):
        return None
    return TensorInfo(shape, encoding, end - start), end
