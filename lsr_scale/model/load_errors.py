"""Messages for what goes wrong when a model is loaded: one sentence with what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from torch.distributed import DistError

from lsr_scale.errors import DoesNotFitError, UserError, did_you_mean
from lsr_scale.model.known_configs import known_names
from lsr_scale.model.names import NAME_FORMS


@contextmanager
def explain_load_errors(name: str, revision: str | None, reading: str | None = None) -> Iterator[None]:
    """Turn an exception from loading a model into a UserError of one sentence with what to do.

    Args:
        name: The model's name.
        revision: Its revision.
        reading: The file of it that Transformers reads here, such as "its config.json": any exception is then
            attributed to that file.

    Raises:
        UserError: for exceptions with a known cause; with `reading`, for all.
    """
    where = f"model.name {name!r}" + (f" (revision {revision!r})" if revision else "")
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(
            f"{where}: the model does not fit into the GPU's memory{_allocator_words(error)}; `lsr-scale plan` says "
            "what it takes",
            on_gpu=True,
        ) from error
    except MemoryError as error:
        raise DoesNotFitError(
            f"{where}: it does not fit into the machine's memory; `lsr-scale plan` says what it takes", on_gpu=False
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
def suggest_base_option(given: str | None, option: str = "--base FOLDER") -> Iterator[None]:
    """Add the option that says where a run's base is now to an error about the run's `model.name`.

    Args:
        given: That option's value; where there is one, the error is about it, and nothing is added.
        option: The option.
    """
    try:
        yield
    except DoesNotFitError:  # wherever it lies
        raise
    except UserError as error:
        if given is not None or not str(error).startswith("model.name"):
            raise
        raise UserError(f"{error}; if it lies elsewhere now: {option}") from error


def _allocator_words(error: torch.OutOfMemoryError) -> str:
    """Return in brackets what PyTorch's allocator wanted, and what there was; "" where it does not say.

    These are the sentences with numbers; its advice, about settings of the allocator, comes after them.
    """
    sentences = " ".join(str(error).split()).removeprefix("CUDA out of memory. ").split(". ")
    told = ". ".join(one for one in sentences[:4] if re.search(r"\d", one))
    return f" ({told})" if told else ""


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
