"""The stages of a run. Each is a function; `report(event, **fields)` is its only way to the screen."""
