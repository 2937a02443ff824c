"""What a model's name means: a hub name, a local folder, or a built-in model."""

from pathlib import Path

from huggingface_hub import errors as hub
from huggingface_hub.utils import validate_repo_id

from lsr_scale.errors import UserError, did_you_mean
from lsr_scale.model import builtin
from lsr_scale.model.folder_checks import check_folder
from lsr_scale.model.known_configs import known_names
from lsr_scale.paths import looks_local, user_path

NAME_FORMS = "a hub name (organization/model), a local folder with a config.json, or builtin:smollm2-135m-instruct"


def resolve(name: str) -> str:
    """Return the path or hub name that Transformers loads a model from.

    A `builtin:` model is converted into a folder on first use (see `builtin`).

    Raises:
        UserError: for a folder that does not exist, a file, or a name that no model can have.
    """
    if name.startswith(builtin.PREFIX):
        return str(builtin.ensure_converted(name))
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
    is_local = looks_local(name)
    if not is_local:
        try:
            validate_repo_id(name)
            return None
        except hub.HFValidationError:
            pass
    near = did_you_mean(name, [*known_names(), *(builtin.PREFIX + model for model in builtin.MODELS)])
    what = "there is no such folder" if is_local else "this is none"
    raise UserError(f"model.name {name!r}: expected {NAME_FORMS}; {what}; {near}")
