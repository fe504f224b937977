"""Between the processes of one fleet: operations go to the process that owns their ledger, answers come back."""
