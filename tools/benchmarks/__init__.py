"""What `tools/bench.py` can measure, a folder for each thing that is measured; `report` is what they share."""
