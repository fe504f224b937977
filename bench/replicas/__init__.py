"""Fleets of servers over one Redis: proofs in full, and what they cost."""
