"""The content scanner that runs when no milter is named.

Read in this order: `limits` (what one message may cost), `parts` (the value that is matched),
`mime` and `archives` (bytes to parts), `rules` (parts to findings), `scan` (all of it, pure),
`milter` (findings to a verdict). Only `milter` knows the author's API; only `rules` knows YARA-X.
"""
