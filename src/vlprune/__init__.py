"""vlprune."""
from .architectures import discover
