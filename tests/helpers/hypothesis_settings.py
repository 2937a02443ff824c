"""Settings of hypothesis: the same examples every time, so many that all properties together take some seconds."""

from hypothesis import HealthCheck, settings


def bounded(max_examples: int) -> settings:
    """Return settings for a property: examples are derived from its code, and none is too slow."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
