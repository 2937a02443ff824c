"""How an integer dimension splits into two factors: divisor pairs and the choice among them, integers only."""

import math


def divisors(n: int) -> list[int]:
    """Return the divisors of `n >= 1` in ascending order, 1 and `n` included."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def balanced_split(n: int) -> tuple[int, int]:
    """Return the most balanced `(larger, smaller)` with `larger * smaller == n`: 768 -> (32, 24)."""
    smaller = max(d for d in divisors(n) if d * d <= n)
    return n // smaller, smaller


def divisor_for_block(n: int, block: float) -> int:
    """Return the divisor `d` of `n` that brings the block size `n / d` nearest to `block`; the smaller on a tie."""
    return min(divisors(n), key=lambda d: (abs(n / d - block), d))
