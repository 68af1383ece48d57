"""Joint share and prune: one hypernetwork decides what goes and what is shared, across towers.

US patent 12,386,873 B2 (Samsung Electronics, granted 2025-08-12) claims a device of this kind. So
this method runs only where it is named explicitly, and is never a default.
"""

from .method import JSP
from .network import HyperNetwork

__all__ = ["JSP", "HyperNetwork"]
