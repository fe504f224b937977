"""The laboratory of fairness: the real engine on a virtual clock, judged by an oracle of its own."""
