"""Sources: one module per way conversations are stored."""
