"""One optimizer step: groups, advantages, batches, the learner, its optimizers and checkpoints."""
