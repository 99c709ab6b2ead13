"""JSON files of a Hugging Face folder: read with messages for users, written in their style."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ssft.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}; give a Hugging Face checkpoint folder") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({' '.join(str(error).split())}); copy the checkpoint again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a JSON object; copy the checkpoint again")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write an object, indented as Hugging Face's files are, letters spelled out. Raises OSError."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
