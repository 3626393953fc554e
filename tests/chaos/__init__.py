"""Many processes that lock, a register that checks their fencing tokens, random faults, and a judge of it
all.

run.py       starts everything, lets the faults happen, asks the checker
servers.py   the servers by topology, and what goes wrong with them
worker.py    a process that acquires, checks, writes, releases
plans.py     what it sets out to do: a function of the seed
diary.py     how it writes down what it believed
kinds.py     the kinds of lock that workers use: a new one is a line there
register.py  a process that refuses fencing tokens lower than one that it has seen
faults.py    what goes wrong and when: a function of the seed
history.py   what is written down, and reading it back
checker.py   the rules that a history has to keep, and the report; they stand in
  exclusion.py  who may hold together, and under which tokens
  turns.py      who waits for whom, and for how long
  endings.py    how requests, leases and processes end, and what they leave
verdict.py   what rules find
limits.py    what the locks do not promise, and what may excuse a loss
"""
