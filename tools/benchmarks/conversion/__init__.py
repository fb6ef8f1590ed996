"""Import and export of weights, against a plain copy."""
