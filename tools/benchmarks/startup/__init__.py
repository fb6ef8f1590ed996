"""What commands cost before they work: measured against `import torch, transformers`."""
