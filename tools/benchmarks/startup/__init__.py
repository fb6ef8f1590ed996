"""Cost of commands before they work: measured against `import torch, transformers`."""
