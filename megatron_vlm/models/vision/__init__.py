"""Vision towers, and the encoder that joins one with a projector."""
