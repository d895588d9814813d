"""`python -m scaledown`, the same as `scaledown`."""

from scaledown.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
