"""Folders that are made once, whichever process comes first."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from .errors import DataError

DEFAULT_CACHE = Path(HF_HOME) / "hf_dlion"


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Fills `folder` unless it exists. Other processes see it complete or not at all."""
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise DataError(f"--cache_dir {folder.parent}: cannot be written to ({error}). Give another.") from error
    try:
        build(working)
        working.chmod(0o755)  # mkdtemp leaves it to the owner alone
        working.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
