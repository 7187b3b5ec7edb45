"""pyspf prefers dnspython where it finds it; here it shall not."""

raise ImportError("dnspython is hidden from this test")
