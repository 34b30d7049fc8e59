"""Tensors on disk: safetensors only, large ones cut into row ranges; no pickle is ever read."""

import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from base.errors import ArtefactError
from base.storage import Staging

_LARGE = 2**28
"""Bytes above which a tensor gets files of its own, each with about as many bytes of its rows."""

_PART = re.compile(r"(.*)@rows(\d{12})", re.DOTALL)


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
            save_file({_key(name, start): block.clone()}, staging / f"{folder}/rows-{files:05}.safetensors")
            files += 1
    save_file(small, staging / f"{folder}/small.safetensors")


def load_tensors(folder: Path, only: Container[str] | None = None) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, or what is named in `only`. Raises ArtefactError naming an unreadable file."""
    whole: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Path]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ArtefactError(f"{folder}: holds no weights; restore or rebuild the artefact")
    for file in files:
        with _opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                part = _PART.fullmatch(key)
                if only is not None and (part[1] if part else key) not in only:
                    continue
                if part:
                    parts.setdefault(part[1], {})[int(part[2])] = file
                else:
                    whole[key] = opened.get_tensor(key)
    for name, blocks in parts.items():
        whole[name] = _joined(folder, name, blocks)
    return whole


def _joined(folder: Path, name: str, blocks: Mapping[int, Path]) -> Tensor:
    """A tensor from its row ranges, one of them in memory at a time beside the whole."""
    ends: dict[int, int] = {}
    end, form = 0, (0,)
    for start, file in sorted(blocks.items()):
        if start != end:
            raise ArtefactError(f"{folder}: rows {end} to {start} of {name!r} are missing; restore or rebuild it")
        with _opened(file) as opened:
            form = tuple(opened.get_slice(_key(name, start)).get_shape())
        end += form[0]
        ends[start] = end
    joined = _read(blocks[0], _key(name, 0)).new_empty(end, *form[1:])
    for start, file in blocks.items():
        joined[start : ends[start]] = _read(file, _key(name, start))
    return joined


def _read(file: Path, key: str) -> Tensor:
    with _opened(file) as opened:
        return opened.get_tensor(key)


def _key(name: str, start: int) -> str:
    return f"{name}@rows{start:012}"


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{file}: cannot be read ({error}); restore or rebuild the artefact") from None


def _blocks(tensor: Tensor, large: int) -> tuple[range, tuple[Tensor, ...]]:
    row = tensor.numel() // tensor.shape[0] * tensor.element_size()
    rows = max(1, large // row)
    return range(0, tensor.shape[0], rows), tensor.split(rows)
