"""The processes of a run, what each holds of the model, and their random numbers."""
