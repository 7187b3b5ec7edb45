"""Settings of the protocol's tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is slow; it is not wrong.
settings.register_profile("protocol", deadline=None)
settings.load_profile("protocol")
