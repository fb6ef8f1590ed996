"""`--check-layout`: shrink the recipe, record a run, compare two, notice a hang; `check.py` does all of it."""
