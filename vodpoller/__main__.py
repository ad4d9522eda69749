"""The program: `vodpoller`, and `python -m vodpoller`."""

from vodpoller.process import prepare


def main() -> None:
    """Run the command that the arguments name."""
    prepare()
    from vodpoller.cli.app import main as command  # noqa: PLC0415 - signals are held back before the import, not after it

    command(prog_name="vodpoller")


if __name__ == "__main__":
    main()
