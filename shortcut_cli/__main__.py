"""`python -m shortcut_cli` runs the `shortcut` command."""

from shortcut_cli.cli.commands import main

if __name__ == "__main__":
    main()
