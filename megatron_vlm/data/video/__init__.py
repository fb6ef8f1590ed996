"""Videos: which frames of one are pictures of its sample (`sampling`), and how those are read (`files`)."""
