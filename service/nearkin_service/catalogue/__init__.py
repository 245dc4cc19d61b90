"""What exists right now: runs, their pushes and generations, who waits and who watches.

Lives on the event loop, which alone changes it, so it needs no locks; what may be asked on other threads says
so. No files, no grpc, no engines.
"""

from nearkin_service.catalogue.events import EventHub
from nearkin_service.catalogue.pushes import Push
from nearkin_service.catalogue.retention import Sweep, sweep
from nearkin_service.catalogue.runs import Catalogue, Run
from nearkin_service.catalogue.signal import Signal

__all__ = ["Catalogue", "EventHub", "Push", "Run", "Signal", "Sweep", "sweep"]
