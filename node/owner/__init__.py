"""What only the run's owner does: keep the root key, sign the spec, issue and revoke tokens."""
