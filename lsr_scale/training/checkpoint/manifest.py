"""Whether a checkpoint is complete and undamaged: its manifest, and what its files say of it."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import TrainerState

from lsr_scale import files
from lsr_scale.adapters.card import CARD_NAME
from lsr_scale.adapters.read import ADAPTER_FILES
from lsr_scale.run.folder import MANIFEST, STATE, TENSORS

TRAINER_STATE = "trainer_state.json"
NEEDED = (STATE, TENSORS, TRAINER_STATE, *ADAPTER_FILES)


class State(BaseModel):
    """`training_state.json`: what resuming needs besides tensors."""

    model_config = ConfigDict(strict=True)

    step: int = Field(ge=0)
    num_processes: int = Field(ge=1)
    first_num_processes: int = Field(ge=1)
    rows_per_step: int = Field(ge=1)
    optimizer: str
    scalars: dict[str, Any]
    groups: list[dict[str, Any]]
    scheduler: dict[str, Any]
    random: list[dict[str, Any]]


def read_state(checkpoint: Path) -> State:
    """Return what a checkpoint's `training_state.json` holds.

    Raises:
        OSError: if it cannot be read.
        pydantic.ValidationError: if it holds something else.
    """
    return State.model_validate_json((checkpoint / STATE).read_bytes())


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of every file in a folder, but of its card, and flush all of it to the disk."""
    files.apply_umask(folder)
    members = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, CARD_NAME))
    listed = {str(f.relative_to(folder)): {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in members}
    for file in members:
        files.fsync(file)
    files.write_json(folder / MANIFEST, {"files": listed})
    files.fsync(folder)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, None if nothing is.

    Its files are compared with its manifest, and its name with the step that its state is of.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"there is no {MANIFEST} in it"
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, expected in listed.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                return f"{MANIFEST} lists {name!r:.80}, which is outside of it"
            file = checkpoint / name
            if not file.is_file():
                return f"there is no {name} in it, which {MANIFEST} lists"
            if (size := file.stat().st_size) != expected["bytes"]:
                return f"{name} is cut short or altered: {size} bytes, {expected['bytes']} in {MANIFEST}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} is altered: its SHA-256 is not that in {MANIFEST}"
        lacking = [name for name in NEEDED if name not in listed]
        if lacking:
            return f"{MANIFEST} does not list {lacking[0]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({str(error)[:200]})"
    return _wrong_state(checkpoint)


def _wrong_state(checkpoint: Path) -> str | None:
    """Return what is wrong with the content of a checkpoint's files, None if nothing is."""
    try:
        step = read_state(checkpoint).step
    except ValidationError as error:
        first = error.errors()[0]
        return f"{STATE}: {'.'.join(map(str, first['loc']))[:80] or 'content'}: {first['msg']}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{STATE} cannot be read ({str(error)[:200]})"
    try:
        content = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
        reached = TrainerState(**content).global_step
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{TRAINER_STATE} cannot be read ({str(error)[:200]})"
    if type(reached) is not int or reached != step:
        return f"{TRAINER_STATE} is of step {reached!r:.40}, {STATE} of step {step}"
    match = re.fullmatch("checkpoint-([0-9]{1,18})", checkpoint.name)
    if match and int(match[1]) != step:
        return f"it was saved after step {step}, which its name should say; name it checkpoint-{step} to resume from it"
    return None


def is_misnamed(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is called by another step than it was saved after: somebody renamed or copied it."""
    try:
        return int(checkpoint.name.rpartition("-")[2]) != read_state(checkpoint).step
    except (OSError, ValueError, RecursionError):
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
