"""Documents in PDF: page frame, text in any script, tables of unbounded length, charts.

Tables are placed by hand on reportlab's canvas, row by row as they come: its own `LongTable` lays all rows
out first, which does not end for 100,000 of them. Pages are compressed as they are closed; some 3 kB of each
stay in memory. Nothing depends on the clock or on chance: the same calls give the same bytes (with the
same versions of reportlab and zlib).

Needs the extra `pdf`.
"""
