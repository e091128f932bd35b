"""Faults under load: a real `tabstop serve` over a tiny model, clients on sockets, a count of how each request ended.

server.py: the server's processes, and what must be left of them. requests.py: what is asked. client.py: one request
over one socket, and how it ended. crowd.py: many clients, and the sum of their ends. Each fault is one file with a
function (short in CI: test_reliability.py) and a command for the full length:

    python -m tests.reliability.kills --times 60        engine and front ends killed or frozen
    python -m tests.reliability.stops --times 100       SIGTERM under load
    python -m tests.reliability.storms --times 10000    streams cancelled at random points, readers that do not read
    python -m tests.reliability.loris --connections 500 headers and bodies that never end, connections without a request
    python -m tests.reliability.machine                 no descriptor or memory left, a clock that jumps
    python -m tests.reliability.blackhole --streams 24  clients whose packets go nowhere
    python -m tests.reliability.disk                    nowhere to write logs to
    python -m tests.reliability.fuzz --cases 20000      schemathesis over /openapi.json
    python -m tests.reliability.cases                   the requests that CI replays: adds what the API has gained
    python -m tests.reliability.soak --minutes 30       mixed traffic at 80 % of what the machine can do

Figures are in benchmarks/RESULTS.md.
"""
