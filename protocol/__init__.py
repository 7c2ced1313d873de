"""Wire messages, identity and admission, transport, limits and errors: what any two peers must agree on."""
