"""``python -m softmeet`` is ``softmeet``."""

from softmeet.cli.main import main

if __name__ == "__main__":
    main()
