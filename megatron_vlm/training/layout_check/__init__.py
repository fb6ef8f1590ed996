"""The parts of `training/check_layout.py`: shrink the recipe, record a run, compare two, notice a hang."""
