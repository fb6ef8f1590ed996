"""Who owns which token, who encodes what, and the groups and exchanges that follow from it."""
