"""The users that quantization is chosen by."""

from __future__ import annotations

from dataset import Split


def nb_calibration_users(split: Split) -> int:
    """How many users, the first ones, settings are chosen by."""
    return max(1, min(round(0.2 * split.nb_users), 2000))
