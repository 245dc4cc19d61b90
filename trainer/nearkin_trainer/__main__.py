"""`python -m nearkin_trainer`, what torchrun starts."""

import sys

from nearkin_trainer.cli import main

if __name__ == "__main__":
    status = main()
    from nearkin_trainer.distributed import end_process  # not before signals are handled: it takes seconds

    end_process(status)
    sys.exit(status)
