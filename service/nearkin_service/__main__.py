"""`python -m nearkin_service` is `nearkin-serve`."""

from nearkin_service.cli import main

main()
