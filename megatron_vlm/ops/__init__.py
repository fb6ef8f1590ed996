"""The hot mathematics behind one door: each operation has a plain-torch twin and chosen backends (DESIGN D8)."""
