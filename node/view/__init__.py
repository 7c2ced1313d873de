"""What the owner sees of a run: telemetry that peers push, one Snapshot, history, metrics, diagnosis."""
