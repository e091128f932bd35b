"""`python -m tabstop`: the same as the command `tabstop`."""

from tabstop.cli import main

if __name__ == "__main__":
    main()
