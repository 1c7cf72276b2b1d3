"""``python -m overlay``: the command line in overlay/cli."""

from overlay.cli import main

if __name__ == "__main__":
    main()
