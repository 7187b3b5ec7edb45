"""Makes the modules beside this one importable for all tests below: amp_link."""
