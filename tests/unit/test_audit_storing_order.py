"""How many transactions a follower looks through at once: as many as fill a block, whatever their density.

After a look that failed it looks through half as many, and more again only slowly.
"""

from __future__ import annotations

from dotmac.platform.audit_trail.storing_order import Window


def width(window: Window) -> int:
    return window.end(0, 1 << 62)


def test_it_widens_where_little_is_found_and_fits_where_much_is() -> None:
    window = Window()
    begun = width(window)
    for _ in range(80):
        window.widen()
    assert begun < width(window) <= 1 << 62
    window.filled(100, 104)
    assert width(window) == 10
    assert window.end(1_000, 1_004) == 1_004


def test_a_look_that_failed_makes_it_narrow_for_a_while() -> None:
    window = Window()
    for _ in range(10):
        window.widen()
    failed = width(window)
    window.narrow()
    half = width(window)
    assert half == failed // 2
    window.widen()
    window.widen()
    assert half <= width(window) < failed
    for _ in range(20):
        window.widen()
    assert width(window) > failed
    for _ in range(80):
        window.narrow()
    assert width(window) == 1
    window.widen()
    assert width(window) >= 1
    for _ in range(10):
        window.widen()
    assert width(window) > 1
