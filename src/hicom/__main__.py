"""`python -m hicom` is the `hicom` command."""

from hicom.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
