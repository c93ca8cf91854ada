"""Assembly: what a command or a notebook calls. Recipes introduce the rooms to each other."""
