"""What happens to a fleet when its coordinator dies, and when it comes back."""

LIFE_SECONDS = 15
"""Of fallback shares, in the variant in which they are to expire."""
