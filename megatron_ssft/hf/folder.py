"""Whether a folder is a Hugging Face checkpoint, and its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ssft.errors import UserError


def is_hf_folder(folder: Path) -> bool:
    """Whether this is a Hugging Face checkpoint and not a run of ours."""
    return (folder / "config.json").is_file()


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json as a dictionary. Raises UserError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}:1: expected a JSON object")
    return config
