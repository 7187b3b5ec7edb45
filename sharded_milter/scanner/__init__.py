"""The content scanner, which runs with no milter given.

Read in this order: `limits` (the work for one message), `parts` (the value that is matched),
`mime` and `archives` (bytes to parts), `rules` (parts to findings), `scan` (all of it, pure),
`milter` (findings to a verdict). Only `milter` knows the author's API; only `rules` knows YARA-X.
"""
