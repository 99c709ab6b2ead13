"""Links in a model folder lead to files of it, or into the download cache that it is a part of; nowhere else.

What a link names is read, trained on and copied into every export. A folder from elsewhere must not choose files of
this machine for that.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ssft.errors import UserError


def refuse_foreign_link(path: Path, folder: Path) -> None:
    """Raise UserError where `path`, a file of the model folder, is a link (or lies behind one) out of it.

    The Hugging Face hub keeps `snapshots/REVISION/` as links into `blobs/` beside it; those are files of the folder.
    """
    own, place = folder.resolve(), path.resolve()
    roots = [own, own.parent.parent / "blobs"] if own.parent.name == "snapshots" else [own]
    if not any(place.is_relative_to(root) for root in roots):
        raise UserError(f"{path}: is a link out of the model folder, to {place}; put the file itself there")
