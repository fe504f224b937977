"""``make demo``: one fleet, three ways to live with a limit, measured at the upstream.

The three modes run once each, one after the other, with the same seed, on one machine. They are not repeated and do
not alternate, because real SDKs sleep in real seconds: one result has no spread, and another seed gives another one.
"""
