"""`python -m shortcut_cli` is the `shortcut` command."""

from shortcut_cli.cli import main

if __name__ == "__main__":
    main()
