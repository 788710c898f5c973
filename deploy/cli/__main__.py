"""`python -m deploy.cli`: the command where it is not installed."""

from deploy.cli.main import main

if __name__ == "__main__":
    main()
