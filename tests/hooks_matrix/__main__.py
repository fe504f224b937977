"""Prints the matrix: ``python -m tests.hooks_matrix``."""

from __future__ import annotations

from tests.hooks_matrix.situations import table

print(table())
