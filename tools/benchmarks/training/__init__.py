"""Training steps of a recipe against transformers', and packed rows against padded ones."""
