"""What the service does: pushing, building, reading, searching, comparing, removing.

Here catalogue (what is), store (what lies on disk) and engines (what is computed) meet; the wire calls
these classes and knows none of the three. All of it runs on the event loop; slow work goes to threads.
"""

from nearkin_service.operations.administering import Administering
from nearkin_service.operations.builds import Builds
from nearkin_service.operations.comparing import Comparing, Comparison
from nearkin_service.operations.core import Core, Engines
from nearkin_service.operations.lending import Lending, Loan
from nearkin_service.operations.places import Places
from nearkin_service.operations.pushing import Pushing
from nearkin_service.operations.reading import Reading, TableBlocks
from nearkin_service.operations.searching import Searching
from nearkin_service.operations.writing import Held, Message, Writing

__all__ = [
    "Administering",
    "Builds",
    "Comparing",
    "Comparison",
    "Core",
    "Engines",
    "Held",
    "Lending",
    "Loan",
    "Message",
    "Places",
    "Pushing",
    "Reading",
    "Searching",
    "TableBlocks",
    "Writing",
]
