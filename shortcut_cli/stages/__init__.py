"""The commands: what each does, free of screen and exit codes. Its `report` is its only way to the screen."""
