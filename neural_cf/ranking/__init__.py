"""Ranking test items: scorers, candidates, ranks and metrics, and the significance of their differences."""
