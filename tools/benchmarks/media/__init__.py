"""The balance of the vision encoder's work over ranks, and the draw of samples that it is measured on."""
