"""`python -m auto_round`."""

from auto_round.cli.main import main

if __name__ == "__main__":
    main()
