"""Text: a conversation made token ids and labels by the tokenizer's template."""
