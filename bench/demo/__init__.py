"""``make demo``: one fleet, three ways to live with a limit, measured at the upstream."""
