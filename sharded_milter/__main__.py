"""`python -m sharded_milter` is `sharded-milter`."""

from sharded_milter.cli.daemon import main

main()
