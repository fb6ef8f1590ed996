"""Videos: which frames of one are images of its sample (`sampling`), and how those are read (`files`)."""
