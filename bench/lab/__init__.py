"""Laboratories: the engine and the simulated upstream on one virtual clock, without a process or a sleep."""
