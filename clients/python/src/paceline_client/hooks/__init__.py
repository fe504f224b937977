"""Hooks into the official SDKs: every call that uses quota is coordinated, with one line and no other change.

``paceline_client.hooks.anthropic`` and ``paceline_client.hooks.openai`` each need their SDK, so neither is imported
here.
"""

from __future__ import annotations

from paceline_client.hooks._labels import labels

__all__ = ["labels"]
