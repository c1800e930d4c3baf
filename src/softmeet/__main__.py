"""Run ``softmeet`` as ``python -m softmeet``."""

from softmeet.cli.main import main

if __name__ == "__main__":
    main()
