"""A trained model in use: opened, sampled, measured."""
