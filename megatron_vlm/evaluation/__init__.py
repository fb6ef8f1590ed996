"""Tasks: a checkpoint answers a file of questions, and the answers are scored. `run.evaluate` is the door."""
