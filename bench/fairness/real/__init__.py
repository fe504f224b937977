"""The rows of the laboratory of fairness that are confirmed by real processes: three servers over one Redis."""
