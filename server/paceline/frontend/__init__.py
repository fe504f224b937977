"""Between the wire and the ledger's owner: decoding, checking, authenticating, routing, answering.

:mod:`paceline.frontend.server` puts it together. An operation goes through :mod:`paceline.frontend.requests` (message
to engine), :mod:`paceline.frontend.desk` (to the ledger and back) and :mod:`paceline.frontend.replies` (engine to
message); :mod:`paceline.frontend.coordinator` and :mod:`paceline.frontend.session` are its two ways in.
"""
