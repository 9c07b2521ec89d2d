"""Verbs: what a user runs, each with its flags. Below this package there are no flags, only Settings."""
