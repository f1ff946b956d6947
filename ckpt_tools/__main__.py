"""``python -m ckpt_tools``: the same program as the console script ``ckpt-tools``."""

from ckpt_tools.cli import main

if __name__ == "__main__":
    main()
