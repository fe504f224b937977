"""One ledger's owner: the engine over a journal, with its clock and its store.

:mod:`paceline.ledger.owner` runs a ledger, :mod:`paceline.ledger.journal` says what a journal is,
:mod:`paceline.ledger.store` opens one from a URL, :mod:`paceline.ledger.clock` keeps the time.
"""
