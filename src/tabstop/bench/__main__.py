"""python -m tabstop.bench bench run …: the benchmark without the server's command line."""

from tabstop.bench.cli import main

main()
