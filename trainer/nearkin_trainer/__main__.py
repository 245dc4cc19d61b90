"""`python -m nearkin_trainer`, what torchrun starts."""

import sys

from nearkin_trainer.cli import main

if __name__ == "__main__":
    sys.exit(main())
