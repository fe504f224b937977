"""Paceline: one coordinator for the LLM API rate limits of a whole fleet."""

__version__ = "0.1.0"
