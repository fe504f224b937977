"""Rows of the laboratory of learning (``bench.lab``), run for real: processes, sockets, and the official SDK.

The laboratory runs the engine on a virtual clock, for long enough to measure one refusal in a thousand calls. Here a
few rows of it run for some minutes with all that it leaves out: the server and its journal, the client library, the
hook, the ``anthropic`` SDK, HTTP, and seconds that pass. They confirm the laboratory's figures; they do not replace
them.
"""
