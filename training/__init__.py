"""Model, pipeline, inner and outer optimisation, data and recovery."""
