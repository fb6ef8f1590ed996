"""Media: image files and the frames of videos made the pixels that a tower takes."""
