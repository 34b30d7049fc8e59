"""Tensors on disk: safetensors only, large ones cut into row ranges; no pickle is ever read."""

from collections.abc import Container, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from base.errors import ArtefactError
from base.storage import Staging

_LARGE = 2**28
"""Bytes above which a tensor gets files of its own, each with about as many bytes of its rows."""

_ROWS = "@rows"


def save_tensors(staging: Staging, folder: str, tensors: Mapping[str, Tensor], *, large: int = _LARGE) -> None:
    """Write named tensors into `folder`: small ones together, large ones as files by row range."""
    small: dict[str, Tensor] = {}
    files = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        kept = tensor.detach().cpu().contiguous()
        size = kept.numel() * kept.element_size()
        if size <= large or kept.ndim == 0:
            small[name] = kept.clone()  # safetensors refuses tensors that share memory
            continue
        for start, block in zip(*_blocks(kept, large), strict=True):
            # The row number in the key, not the file's name: names may hold anything.
            save_file({f"{name}{_ROWS}{start:012}": block.clone()}, staging / f"{folder}/rows-{files:05}.safetensors")
            files += 1
    save_file(small, staging / f"{folder}/small.safetensors")


def load_tensors(folder: Path, only: Container[str] | None = None) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, or what is named in `only`. Raises ArtefactError naming an unreadable file."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtefactError(f"{folder}: holds no weights; restore or rebuild the artefact")
    for file in files:
        try:
            loaded = _load(file, only)
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{file}: cannot be read ({error}); restore or rebuild the artefact") from None
        for key, tensor in loaded.items():
            name, mark, start = key.rpartition(_ROWS)
            if mark:
                parts.setdefault(name, {})[int(start)] = tensor
            else:
                whole[key] = tensor
    for name, blocks in parts.items():
        end = 0
        for start in sorted(blocks):
            if start != end:
                raise ArtefactError(f"{folder}: rows {end} to {start} of {name!r} are missing; restore or rebuild it")
            end += blocks[start].shape[0]
        whole[name] = torch.cat([blocks[s] for s in sorted(blocks)])
    return whole


def _load(file: Path, only: Container[str] | None) -> dict[str, Tensor]:
    with safe_open(file, "pt") as opened:
        return {k: opened.get_tensor(k) for k in opened.keys() if only is None or _name(k) in only}  # noqa: SIM118


def _name(key: str) -> str:
    name, mark, _ = key.rpartition(_ROWS)
    return name if mark else key


def _blocks(tensor: Tensor, large: int) -> tuple[range, tuple[Tensor, ...]]:
    row = tensor.numel() // tensor.shape[0] * tensor.element_size()
    rows = max(1, large // row)
    return range(0, tensor.shape[0], rows), tensor.split(rows)
