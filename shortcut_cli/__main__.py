"""The `shortcut` command, also as `python -m shortcut_cli`.

Signals are blocked first: they wait for the thread that handles them, which starts before the commands are imported.
Worker processes import this file too, so a Ctrl-C that reaches them before they are ready leaves no traceback.
"""

import signal

signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


def main() -> None:
    """Run the command that the arguments of this process name."""
    from shortcut_cli.cli.signals import leave, signals

    signals.install()
    from shortcut_cli.cli.commands import main as run

    try:
        run()
    except SystemExit as end:
        leave(end)
        raise


if __name__ == "__main__":
    main()
