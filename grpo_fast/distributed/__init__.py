"""The processes of a run, their shards of the model, and their random numbers."""
