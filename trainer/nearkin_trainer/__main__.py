"""`python -m nearkin_trainer`, what torchrun starts."""

import sys

from nearkin_trainer.cli import main
from nearkin_trainer.distributed import end_process

if __name__ == "__main__":
    status = main()
    end_process(status)
    sys.exit(status)
