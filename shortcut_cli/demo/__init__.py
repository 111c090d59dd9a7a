"""The data of `shortcut demo`, generated offline."""
