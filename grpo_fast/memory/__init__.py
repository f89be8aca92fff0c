"""What a run takes in memory: planned, traced and reported."""
