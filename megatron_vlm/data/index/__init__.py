"""Index: per sample its place, its length and its images, built once and kept beside the data."""
