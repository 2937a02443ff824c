"""What the name of a model means, and words for what goes wrong when it is loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import errors as hub
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch.distributed import DistError

from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.model import builtin
from lsr_scale.model.folder_checks import check_folder
from lsr_scale.model.known_configs import known_names
from lsr_scale.paths import user_path

NAME_FORMS = "a hub name (organization/model), a local folder with a config.json, or builtin:smollm2-135m-instruct"


def resolve(name: str) -> str:
    """Return what Transformers loads a model by: a local folder, or the hub name unchanged.

    `builtin:` names are converted into a folder on first use (see `builtin`).

    Raises:
        UserError: for a folder that is not there, a file, or a name that no model can have.
    """
    if name.startswith(builtin.PREFIX):
        return str(builtin.ensure(name))
    folder = local_folder(name)
    return name if folder is None else str(folder)


def local_folder(name: str) -> Path | None:
    """Return the folder that a name means, or None if it is a hub name."""
    path = user_path(name, "model.name")
    if path.is_dir():
        check_folder(name, path)
        return path
    if path.is_file():
        raise UserError(f"model.name {name!r}: expected {NAME_FORMS}, got a file; give the folder that it lies in")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not looks_local:
        try:
            validate_repo_id(name)
            return None
        except hub.HFValidationError:
            pass
    near = did_you_mean(name, [*known_names(), *(builtin.PREFIX + model for model in builtin.MODELS)])
    what = "there is no such folder" if looks_local else "this is none"
    raise UserError(f"model.name {name!r}: expected {NAME_FORMS}; {what}; {near}")


@contextmanager
def explained(name: str, revision: str | None, reading: str | None = None) -> Iterator[None]:
    """Turn what goes wrong in loading a model into one sentence with a remedy.

    Args:
        name: The model's name.
        revision: Its revision.
        reading: What of it Transformers reads here, such as "its config.json": whatever it raises is then taken for
            that file's fault.
    """
    where = f"model.name {name!r}" + (f" (revision {revision!r})" if revision else "")
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{where}: the GPU's memory does not hold the model; `lsr-scale plan` says what it takes"
        ) from error
    except MemoryError as error:
        raise UserError(
            f"{where}: the machine's memory does not hold it; `lsr-scale plan` says what it takes"
        ) from error
    except DistError:
        raise
    except Exception as error:
        remedy = _remedy(error)
        if remedy is None and reading is not None:
            words = " ".join(str(error).split())[:300]
            remedy = f"{reading} cannot be used ({type(error).__name__}: {words}); fetch the model again"
        if remedy is None:
            raise
        raise UserError(f"{where}: {remedy}") from error


@contextmanager
def elsewhere(given: str | None, option: str = "--base FOLDER") -> Iterator[None]:
    """Name the option that tells where a run's base lies now, where the name that the run has for it fails.

    Args:
        given: What that option says; where it says something, it is what is wrong.
        option: The option.
    """
    try:
        yield
    except UserError as error:
        if given is not None or not str(error).startswith("model.name"):
            raise
        raise UserError(f"{error}; if it lies elsewhere now: {option}") from error


def _remedy(error: BaseException) -> str | None:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(str(error).split())

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if caused_by(SafetensorError):
        return f"a weight file is damaged or cut short ({chain[-1]}); fetch the model again"
    if caused_by(hub.GatedRepoError):
        return "access needs its licence accepted on its hub page, and a token; then run: hf auth login"
    if caused_by(hub.RevisionNotFoundError):
        return "the model has no such revision; leave model.revision out for the newest"
    if caused_by(hub.RepositoryNotFoundError):
        near = did_you_mean(text.split()[0], known_names())
        return f"the hub knows no such model (a private one needs: hf auth login); expected {NAME_FORMS}; {near}"
    if "trust_remote_code" in text:
        return (
            "it needs Python code from its repository, which is never run here; choose a model that Transformers knows"
        )
    if "Unrecognized model" in text:
        return "there is no config.json with a model_type in it; fetch the model again"
    if "does not recognize this architecture" in text:
        return "this version of Transformers does not know its architecture; `lsr-scale doctor` shows what is installed"
    if "size mismatch" in text or "mismatched" in text:
        return f"its weight files do not have the shapes that its config.json says ({text[:300]})"
    if caused_by(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError) or "couldn't connect" in text:
        return (
            "it is not on this machine and the hub cannot be reached; fetch it where there is a network "
            f"(hf download NAME --local-dir FOLDER) and give the folder; expected {NAME_FORMS}"
        )
    if isinstance(error, ImportError) and "flashattention" in text.lower().replace(" ", ""):
        return "model.attention asks for FlashAttention, whose package flash-attn is not installed; set it to auto"
    if isinstance(error, ImportError) or ("attention" in text.lower() and isinstance(error, ValueError)):
        return text[:400]
    if isinstance(error, OSError):
        return f"it cannot be loaded ({text[:400]})"
    return None
