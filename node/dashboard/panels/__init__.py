"""What the page shows: a file a topic, pure functions from a Snapshot and the page's state to Markup."""
