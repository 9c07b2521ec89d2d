"""Files that come with the package: schedules of quantization-aware training, and the published model's statistics."""

from __future__ import annotations

from pathlib import Path


def shipped_file(name: str) -> Path | None:
    """Return the file of that name that comes with the package, None where there is none."""
    path = Path(__file__).parent / Path(name).name
    return path if path.suffix == ".yaml" and path.is_file() and Path(name).name == name else None
