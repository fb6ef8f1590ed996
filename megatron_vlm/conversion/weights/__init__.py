"""Weight files of Hugging Face's kinds, the tensors in them as sources, and a model's parameters filled from them."""
