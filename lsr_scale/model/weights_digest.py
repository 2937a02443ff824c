"""Which weights a model's folder has: a digest of some bytes of each tensor, that takes no time and no memory."""

import hashlib
import json
import struct
from functools import lru_cache
from pathlib import Path

from lsr_scale.errors import UserError
from lsr_scale.model.folder_checks import weight_files

_SAMPLE = 64  # bytes, from the beginning, the middle and the end of a tensor
_LARGEST_HEADER = 100_000_000


def weights_digest(folder: str | Path, chosen: str | None = None) -> str | None:
    """Return a digest of the tensors that Transformers loads of a folder; None where there are none that can be read.

    It is the same however they are split into files, and for a quantized copy in memory, since the files are looked at.
    A change of every value, such as training and merging make, is seen; one of a few values may be passed over.

    Args:
        folder: A model's folder; a hub name, or no name, is none.
        chosen: See `weight_files`.
    """
    try:
        files = sorted(weight_files(Path(folder), chosen)) if str(folder) else []
        return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    except (UserError, OSError, ValueError, KeyError, TypeError, struct.error):
        return None


@lru_cache(maxsize=16)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str | None:
    sampled: dict[str, bytes] = {}
    for path, _, _ in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _LARGEST_HEADER)))
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                begin, end = tensor["data_offsets"]
                content = json.dumps([tensor["dtype"], tensor["shape"]]).encode()
                for place in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
                    file.seek(8 + length + place)
                    content += file.read(min(_SAMPLE, end - place))
                sampled[name] = content
    if not sampled:
        return None
    return hashlib.sha256(b"".join(name.encode() + sampled[name] for name in sorted(sampled))).hexdigest()
