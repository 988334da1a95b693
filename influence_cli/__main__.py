"""Starts the command line."""

from influence_cli.signals import exit_at_once, handle_signals


def main() -> None:
    handle_signals(exit_at_once)  # a signal while Python loads the commands shows no stack trace
    from influence_cli.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
