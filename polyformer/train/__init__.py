"""Training: one loop for every model, and the run folder that it leaves behind."""
