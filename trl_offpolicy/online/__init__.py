"""Training that rewrites while it trains: the rows of the next steps are drawn from the policy as it is now."""
